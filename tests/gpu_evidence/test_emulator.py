"""The PTX that Triton makes of the shipped configurations, executed: right results, no race, nothing out of bounds.

The emulator raises on an access outside a tensor, a shared-memory race between warps, data read before its asynchronous
copy has landed, and a barrier that some threads miss.
"""

import pytest
import torch

from opsdl.kernels import configs
from tests.support.gpu import launches, loss_cases


def emulated(inputs, arch, monkeypatch, **options):
    monkeypatch.setattr(configs, "capability", lambda device: arch // 10)
    monkeypatch.setattr(configs, "PROGRAMS", 2)  # so that a program merges several tiles
    reports = []
    with launches.substituted(lambda launch: reports.append(launches.emulate(launch, arch, **options))):
        return loss_cases.solve(inputs), reports


@pytest.mark.parametrize(
    "variant, shape",
    [
        ("one head", (70, 72, 200)),
        ("two heads, the student's padded, and tokens", (33, 40, 150)),
        ("one head, close", (20, 136, 140)),
    ],
)
@pytest.mark.parametrize("arch", [80, 90])
def test_bf16(arch, variant, shape, monkeypatch):
    inputs = loss_cases.make(torch.bfloat16, *shape, seed=arch, **loss_cases.VARIANTS[variant])
    got, reports = emulated(inputs, arch, monkeypatch)
    loss_cases.check(inputs, got)
    tensor_cores = {80: "mma.sync", 90: "wgmma.mma_async"}[arch]
    assert all(any(tensor_cores in opcode for opcode in report.opcodes) for report in reports)


@pytest.mark.parametrize("arch", [80, 90])
def test_fp32(arch, monkeypatch):
    inputs = loss_cases.make(torch.float32, 40, 36, 100, seed=arch, **loss_cases.VARIANTS["one head, bias and cap"])
    got, _ = emulated(inputs, arch, monkeypatch)
    loss_cases.check(inputs, got)
