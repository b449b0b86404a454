"""Would the tests notice? Kernels with one seeded fault each, which the emulator or the numbers must catch."""

import importlib
from pathlib import Path

import pytest
import torch

from opsdl.kernels import forward
from opsdl.kernels.operands import Operands
from tests.support.gpu import launches, loss_cases
from tools import ptxsim
from tools.ptxsim import mutation

FAULTS = {
    "the last tile's vocabulary mask": ("tile.py", "mask=mask_v[None, :] & inside", "mask=inside"),
    "the mask of the hidden size": ("tile.py", "mask=mask_n[:, None] & inside[None, :]", "mask=mask_n[:, None]"),
    "rescaling of the old sum": ("tile.py", "total * tl.exp(top - base)", "total"),
    "rescaling of the old teacher sum": (
        "tile.py",
        "teacher_total * tl.exp(teacher_top - teacher_base)",
        "teacher_total",
    ),
    "one tile too few": ("forward.py", "tl.cdiv(V, BV))", "tl.cdiv(V, BV) - 1)"),
    "the stride of the head": ("operands.py", "self.weight_VH.stride(0)\n", "self.weight_VH.stride(0) + 8\n"),
    "adding to earlier chunks": ("backward.py", "if ADD:", "if not ADD:"),
    "the chunk's first token id": ("backward.py", "other=-1) - first_column", "other=-1) - first_column - 1"),
}


def small():
    return loss_cases.make(torch.bfloat16, 40, 72, 300, seed=1, teacher_size=24, tokens=True)


def noticed(run) -> bool:
    try:
        run()
    except (ptxsim.PtxError, AssertionError):
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_source_is_noticed(fault, tmp_path, monkeypatch):
    file, right, wrong = FAULTS[fault]
    name = f"mutant_{list(FAULTS).index(fault)}"
    (tmp_path / name).mkdir()
    for path in Path(forward.__file__).parent.glob("*.py"):
        text = path.read_text().replace("opsdl.kernels", name)
        if path.name == file:
            assert right in text, "the fault is seeded nowhere: the kernel has changed"
            text = text.replace(right, wrong)
        (tmp_path / name / path.name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    configs = importlib.import_module(f"{name}.configs")
    monkeypatch.setattr(configs, "WORKSPACE_BYTES", 1 << 14)  # several chunks
    monkeypatch.setattr(configs, "PROGRAMS", 1)  # all tiles merge in one program

    def run():
        with launches.substituted(lambda launch: launches.emulate(launch, 80), name):
            loss_cases.check(inputs, loss_cases.solve(inputs, name))

    inputs = small()
    assert noticed(run)


@pytest.mark.parametrize(
    "what, least", [("bar.sync", 0.5), ("cp.async.wait_group", 0.2)], ids=["barriers", "waits for copies"]
)
def test_dropped_synchronisation_is_noticed(what, least):
    """One instruction deleted at a time from the moments kernel; some are redundant, so a share must be noticed."""
    inputs = loss_cases.make(torch.bfloat16, 40, 192, 144, seed=2)
    caught = []

    def survey(launch):
        ptx = []
        launches.emulate(launch, 80, edit_ptx=lambda text: ptx.append(text) or text)
        for mutant in list(mutation.deletions(ptx[0], mutation.SYNCHRONISATION[what]))[:8]:
            try:
                launches.emulate(launch, 80, edit_ptx=lambda text, mutant=mutant: mutant)
                caught.append(False)
            except ptxsim.PtxError:
                caught.append(True)

    with launches.substituted(survey):
        forward.linear_moments(Operands(**inputs))
    assert sum(caught) >= max(1, least * len(caught)), caught
