"""What the cases work on, and the float64 truth about it.

Shape suffixes as in opsdl: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
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


class LossAndGradients(NamedTuple):
    loss: Tensor
    grad_hidden_NH: Tensor
    grad_weight_VH: Tensor


def make_inputs(shape: Shape, dtype: str, noise: float) -> Inputs:
    """Logits of standard deviation 2.5; teacher hidden states `noise` away from the student's."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    hidden_NH = draw(shape.N, shape.H)
    teacher_NH = hidden_NH + noise * draw(shape.N, shape.H)
    weight_VH = draw(shape.V, shape.H).mul_(2.5 / shape.H**0.5)
    tokens_N = torch.randint(shape.V, (shape.N,), generator=generator)
    hidden_NH, weight_VH, teacher_NH = (x.to(getattr(torch, dtype)) for x in (hidden_NH, weight_VH, teacher_NH))
    return Inputs(hidden_NH, weight_VH, teacher_NH, tokens_N)


def truth_in_parts(inputs: Inputs) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The float64 truth about the very same (rounded) inputs, 64 tokens at a time.

    With c = gap - sum p gap, KL = log1p(sum p (expm1(-c) + c)) and d KL / d logits = p c: no cancellation at small KL.

    Yields:
        The student's hidden states [n, H], the reverse KL [n], and the gradient of the mean KL for the logits [n, V].
    """
    weight_VH = inputs.weight_VH.double()
    # All float64 logits of the largest shape at once would take gigabytes.
    for hidden_nH, teacher_nH in zip(inputs.hidden_NH.split(64), inputs.teacher_NH.split(64), strict=True):
        hidden_nH = hidden_nH.double()
        p_nV = (hidden_nH @ weight_VH.T).softmax(-1)
        gap_nV = (hidden_nH - teacher_nH.double()) @ weight_VH.T
        c_nV = gap_nV - (p_nV * gap_nV).sum(-1, keepdim=True)
        kl_n = torch.log1p((p_nV * (torch.expm1(-c_nV) + c_nV)).sum(-1))
        yield hidden_nH, kl_n, p_nV.mul_(c_nV).div_(len(inputs.hidden_NH))


def truth(inputs: Inputs) -> LossAndGradients:
    """Mean reverse KL and its gradients in float64."""
    weight_VH = inputs.weight_VH.double()
    grad_weight_VH = torch.zeros_like(weight_VH)
    kls_n, grads_nH = [], []
    for hidden_nH, kl_n, grad_nV in truth_in_parts(inputs):
        kls_n.append(kl_n)
        grads_nH.append(grad_nV @ weight_VH)
        grad_weight_VH.addmm_(grad_nV.T, hidden_nH)
    return LossAndGradients(torch.cat(kls_n).mean(), torch.cat(grads_nH), grad_weight_VH)


def hidden_truth(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Mean reverse KL and its gradient for the hidden states alone, in float64: half the work of `truth`."""
    weight_VH = inputs.weight_VH.double()
    kls_n, grads_nH = zip(*((kl_n, grad_nV @ weight_VH) for _, kl_n, grad_nV in truth_in_parts(inputs)), strict=True)
    return torch.cat(kls_n).mean(), torch.cat(grads_nH)


def relative_error(x: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float((x.detach().double() - expected).norm() / expected.norm())
