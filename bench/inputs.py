"""What the cases work on, and the float64 truth about it.

Shape suffixes as in opsdl: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    N: int
    H: int
    V: int

    def __str__(self) -> str:
        return f"N={self.N} H={self.H} V={self.V}"


# The last two have the heads of SmolLM2-135M and Qwen3-1.7B.
SHAPES = (Shape(1024, 1024, 32000), Shape(512, 576, 49152), Shape(256, 2048, 151936))
DTYPES = ("bfloat16", "float32")

# Noise of the teacher's hidden states for KL of about 1, 1e-2, 1e-4, 1e-6 and 1e-7. In bfloat16 small noise moves few
# elements, but those by a whole unit in the last place.
NOISE = {"bfloat16": (0.6, 0.06, 4e-3, 1.3e-4, 1.3e-5), "float32": (0.6, 0.06, 6e-3, 6e-4, 1.8e-4)}


@dataclass(frozen=True)
class Inputs:
    """One head for student and teacher, separate hidden states: a live self-teacher."""

    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_NH: Tensor
    tokens_N: Tensor  # for cross-entropy

    def leaves(self) -> Inputs:
        """The same data, with gradients wanted for hidden states and head."""
        return replace(
            self,
            hidden_NH=self.hidden_NH.detach().requires_grad_(),
            weight_VH=self.weight_VH.detach().requires_grad_(),
        )


class Result(NamedTuple):
    loss: Tensor | None
    grad_hidden_NH: Tensor
    grad_weight_VH: Tensor | None


def make_inputs(shape: Shape, dtype: str, noise: float) -> Inputs:
    """Logits of standard deviation 2.5; teacher hidden states `noise` away from the student's."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    hidden_NH = draw(shape.N, shape.H)
    teacher_NH = hidden_NH + noise * draw(shape.N, shape.H)
    weight_VH = draw(shape.V, shape.H).mul_(2.5 / shape.H**0.5)
    tokens_N = torch.randint(shape.V, (shape.N,), generator=generator)
    return Inputs(*(x.to(getattr(torch, dtype)) for x in (hidden_NH, weight_VH, teacher_NH)), tokens_N)


def truth(inputs: Inputs, weight_gradient: bool) -> Result:
    """Mean reverse KL and its gradients in float64, from the very same (rounded) inputs.

    With c = gap - sum p gap, KL = log1p(sum p (expm1(-c) + c)) and d KL / d logits = p c: no cancellation at small KL.
    """
    weight_VH = inputs.weight_VH.double()
    grad_weight_VH = torch.zeros_like(weight_VH) if weight_gradient else None
    total, grads_nH, count = 0.0, [], len(inputs.hidden_NH)
    # 64 tokens at a time: all float64 logits of the largest shape would take gigabytes.
    for hidden_nH, teacher_nH in zip(inputs.hidden_NH.split(64), inputs.teacher_NH.split(64), strict=True):
        hidden_nH = hidden_nH.double()
        p_nV = (hidden_nH @ weight_VH.T).softmax(-1)
        gap_nV = (hidden_nH - teacher_nH.double()) @ weight_VH.T
        c_nV = gap_nV - (p_nV * gap_nV).sum(-1, keepdim=True)
        total += torch.log1p((p_nV * (torch.expm1(-c_nV) + c_nV)).sum(-1)).sum() / count
        grad_nV = p_nV.mul_(c_nV).div_(count)
        grads_nH.append(grad_nV @ weight_VH)
        if weight_gradient:
            grad_weight_VH.addmm_(grad_nV.T, hidden_nH)
    return Result(total, torch.cat(grads_nH), grad_weight_VH)


def relative_error(x: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float((x.double() - expected).norm() / expected.norm())
