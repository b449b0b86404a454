"""The kernels in Triton's interpreter, against float64. Run by test_interpreter.py in a process of its own."""

from tools import bf16_interpreter

bf16_interpreter.install()  # before triton is imported

import pytest  # noqa: E402
import torch  # noqa: E402

import opsdl  # noqa: E402
from tests.support.gpu import loss_cases  # noqa: E402

SHAPES = [(1, 8, 5), (65, 70, 257), (70, 33, 300)]


@pytest.mark.parametrize("variant", loss_cases.VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(dtype, variant, monkeypatch):
    monkeypatch.setattr("opsdl.kernels.configs.PROGRAMS", 2)  # so that a program merges several tiles
    for seed, shape in enumerate(SHAPES):
        if loss_cases.VARIANTS[variant].get("padding", 0) >= shape[2]:
            continue
        inputs = loss_cases.make(dtype, *shape, seed=seed, **loss_cases.VARIANTS[variant])
        loss_cases.check(inputs, loss_cases.solve(inputs))


def test_chunks_that_do_not_fit_the_workspace(monkeypatch):
    monkeypatch.setattr("opsdl.kernels.configs.WORKSPACE_BYTES", 64 * 4 * 70)
    inputs = loss_cases.make(torch.float32, 150, 70, 300, seed=5, tokens=True)
    loss_cases.check(inputs, loss_cases.solve(inputs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_through_the_public_loss(reduction):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, 40, generator=generator), torch.randn(130, 40, generator=generator)
    bias = torch.randn(130, 2, generator=generator)[:, 0]  # not contiguous
    teacher = hidden + 0.2 * torch.randn(9, 40, generator=generator)
    mask = torch.arange(9) % 3 > 0
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        loss, stats = opsdl.fused_reverse_kl(
            h, w, teacher.to(dtype), student_bias=bias.to(dtype), mask=mask, reduction=reduction, vocab_size=120,
            backend=backend, return_stats=True,
        )  # fmt: skip
        loss.sum().backward()
        results.append([loss.detach(), h.grad, w.grad, *stats.values()])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got.double(), expected.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.2], ids=["all skipped", "some skipped"])
def test_skipping(noise):
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(9, 40, generator=generator), torch.randn(130, 40, generator=generator)
    teacher = hidden + noise * torch.logspace(-4, 0, 9)[:, None] * torch.randn(9, 40, generator=generator)
    gradients = []
    for tolerance in (None, 1e-2):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, stats = opsdl.fused_reverse_kl(
            h, w, teacher, backend="triton", skip_tolerance=tolerance, return_stats=True
        )
        loss.backward()
        gradients.append((h.grad, w.grad))
    assert stats["skipped"].sum() >= (9 if noise == 0 else 1)
    for exact, skipped in zip(*gradients, strict=True):
        assert (skipped - exact).norm() <= 2e-2 * exact.norm()
