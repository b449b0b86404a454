"""Small random inputs for the losses, and comparisons, without anything but torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from opsdl.losses import available_backends

PAIR_SHAPE = 37, 24, 301  # N, H, V of make_pair
SMALL_SHAPE = 9, 6, 150  # N, H, V of small_inputs
DTYPES = {"cpu": torch.float32, "torch": torch.float64}  # what small_inputs are tried in
TOLERANCE = {"cpu": 1e-4, "torch": 1e-9}


def has(backend: str) -> bool:
    return available_backends()[backend] == "available"


def relative(x: Tensor, expected: Tensor) -> float:
    """Return the relative Frobenius error."""
    return float((x.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


def assert_close(got: Iterable[Tensor], expected: Iterable[Tensor], rtol: float = 1e-9) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * 1e-2)


def make_pair(
    noise: float,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    teacher_hidden_size: int = PAIR_SHAPE[1],
    tokens: int = PAIR_SHAPE[0],
) -> list[Tensor]:
    """Return student hidden, head, teacher hidden `noise` apart, teacher head; logits of standard deviation 2.5."""
    _, H, V = PAIR_SHAPE
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    student_NH = draw(tokens, H)
    teacher_NH = student_NH + noise * draw(tokens, H) if teacher_hidden_size == H else draw(tokens, teacher_hidden_size)
    weights = [draw(V, h) * 2.5 / h**0.5 for h in (H, teacher_hidden_size)]
    return [x.to(dtype) for x in (student_NH, weights[0], teacher_NH, weights[1])]


def small_inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """Return student hidden, head, teacher hidden, teacher head, bias, tokens, mask."""
    N, H, V = SMALL_SHAPE
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    student = draw(N, H)
    tokens, mask = torch.randint(V, (N,), generator=generator), torch.rand(N, generator=generator) < 0.7
    return student, draw(V, H), student + 0.3 * draw(N, H), draw(V, H), draw(V), tokens, mask
