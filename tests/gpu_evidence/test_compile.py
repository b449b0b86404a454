"""Every shipped configuration compiled for sm_80, sm_90 and sm_100, within budgets; for gfx942, compiled."""

import pytest
import torch

from opsdl.kernels import configs
from tests.support.gpu import launches, loss_cases
from tools import triton_aot

# Registers per thread that each kernel may take; none may spill. Compiler versions move them by a few.
BUDGET = {
    (80, "moments_kernel"): 200, (90, "moments_kernel"): 184, (100, "moments_kernel"): 255,
    (80, "gradient_kernel"): 200, (90, "gradient_kernel"): 184, (100, "gradient_kernel"): 160,
    (80, "product_kernel"): 200, (90, "product_kernel"): 128, (100, "product_kernel"): 136,
}  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def launched(dtype, arch, monkeypatch, **variant):
    """Every launch of both passes, as the launchers of that architecture make them."""
    monkeypatch.setattr(configs, "capability", lambda device: 9 if arch == "gfx942" else arch // 10)
    found = {}
    with launches.substituted(lambda launch: found.setdefault((launch.name, str(launch.constants)), launch)):
        loss_cases.solve(loss_cases.make(dtype, 256, 128, 512, seed=0, **variant))
    return found.values()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_within_budget(arch, dtype, monkeypatch):
    for launch in launched(dtype, arch, monkeypatch):
        built = launches.compiled(launch, arch)
        half = dtype != torch.float32
        triton_aot.assert_budget(
            built,
            max_registers=BUDGET[arch, launch.name] if half else 255,
            requires=[triton_aot.TENSOR_CORE_OPCODE[arch], "LDGSTS"] if half else ["FFMA"],
        )


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_option_at_once_does_not_spill(arch, monkeypatch):
    for launch in launched(torch.bfloat16, arch, monkeypatch, bias=True, softcap=6.0, tokens=True):
        triton_aot.assert_budget(launches.compiled(launch, arch))


def test_compiles_for_amd(monkeypatch):
    for launch in launched(torch.bfloat16, "gfx942", monkeypatch):
        assert "v_mfma_f32" in launches.compiled(launch, "gfx942").asm["amdgcn"]


@pytest.mark.parametrize("key", configs.CONFIGS, ids=str)
def test_workspace_is_bounded(key):
    """From the function the launcher allocates by: 64 MiB whatever the sizes."""
    for tokens in (1, 700, 1 << 20):
        for vocabulary in (5, 32000, 262144):
            for hidden in (8, 1024, 8192):
                size = configs.workspace_bytes(tokens, vocabulary, hidden, key[1], configs.CONFIGS[key])
                assert size <= 64 << 20
                assert configs.moments_bytes(1 << 16, vocabulary, configs.CONFIGS[key]) <= 64 << 20
