"""The package as users import it: light, lazy, whole, and useful without the optional packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import opsdl

PACKAGE = Path(opsdl.__file__).parent

# Installed before anything else, this makes packages behave as if they were not there.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(code: str, blocked: tuple[str, ...] = ()) -> str:
    """The output of `code` in a new interpreter in which `blocked` packages cannot be imported."""
    program = f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_adds_little_to_torch():
    code = "import time, torch; start = time.perf_counter(); import opsdl; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(5)) < 0.3


def test_import_and_losses_leave_heavy_packages_alone():
    code = """
import sys, opsdl
print(*sys.modules)
opsdl.fused_reverse_kl, opsdl.reference
print(*sys.modules)
"""
    after_import, after_losses = (set(line.split()) for line in python(code).splitlines())
    assert "torch" not in after_import
    assert not {"transformers", "triton", "omegaconf", "matplotlib"} & after_losses


def test_losses_run_with_torch_alone():
    code = """
import torch, opsdl
hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(11, 8)
opsdl.fused_reverse_kl(hidden, weight, torch.randn(3, 8)).backward()
print(hidden.grad.isfinite().all().item())
"""
    assert python(code, ("transformers", "triton", "omegaconf", "matplotlib", "gguf", "tqdm")).strip() == "True"


@pytest.mark.parametrize("name", opsdl.__all__)
def test_public_names_resolve(name):
    assert getattr(opsdl, name) is not None
    assert name in dir(opsdl)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fused_forward_kl'"):
        opsdl.fused_forward_kl  # noqa: B018


def test_every_folder_with_modules_is_a_package():
    """setuptools leaves out the others, and only an installed copy would show it."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["train", "recipes/any.yaml"], "omegaconf"),
        (["eval", "recipes/any.yaml"], "omegaconf"),
        (["prepare", __file__, "--model", "m", "--out", "new.jsonl"], "transformers"),
    ],
)
def test_command_without_its_packages_says_what_to_install(arguments, missing):
    blocked = ("omegaconf", "transformers", "yaml")
    code = f"""
import sys
from opsdl.cli.main import main
sys.stderr = sys.stdout
print(main({arguments!r}))
"""
    line, exit_code = python(code, blocked).splitlines()
    assert exit_code == "2"
    assert f"No module named '{missing}'" in line and "pip install 'opsdl[train]'" in line


def test_info_needs_torch_only():
    code = "from opsdl.cli.main import main; main(['info'])"
    assert "loss backend reference" in python(code, ("transformers", "triton", "omegaconf"))


def test_builds_without_a_compiler_that_works(tmp_path):
    """The package is made without its extension, and says so."""
    root = PACKAGE.parent
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    for name in ("opsdl", "kernels", "csrc"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CC": "false", "CXX": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the C++ extension was not built" in done.stdout and not list(tmp_path.glob("opsdl/*.so"))
