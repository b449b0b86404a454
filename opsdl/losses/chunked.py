"""The losses in torch, a block of tokens at a time; student and teacher logits exist for that block only.

The gradient is taken in the forward: once the block's logits are there, dHidden and dWeight cost two more matrix
products (four in all), instead of recomputing the logits in the backward (six). What the forward does not know is the
gradient that will arrive from above; for "mean" and "sum" it is one scalar that scales the result, for "none" the
backward runs the blocks again with the per-token gradient that arrived.

Arithmetic is float32 whatever the inputs (float64 for float64): with p (gap - mean gap) a difference of near equals
once the student has converged, bf16 logits leave 190 % error in the gradient at KL 4e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opsdl.losses.arguments import Head
from opsdl.losses.shards import Shards

BLOCK_BYTES = 32 << 20  # of one [block, V] float32 tensor; about six of them live at a time

# What a loss makes of one block: (values [n], stats {name: [n]}, d value / d logits [n, V] as a closure)
Block = tuple[Tensor, dict[str, Tensor], Callable[[], Tensor]]


@dataclass(frozen=True)
class Student:
    """The differentiable side, flat: hidden [N, H], and what to do with its logits."""

    hidden: Tensor
    head: Head
    block_loss: Callable[[Tensor, Tensor], Block]  # (token indices [n], capped and scaled logits [n, V]) -> Block
    shards: Shards
    skip_tolerance: float  # relative error allowed in the gradient for the logits


class ChunkedLoss(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], bias [V] or None, scale [N]) -> per-token losses [N] or their weighted sum.

    The per-token statistics of the forward are left in `stats`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, scale, student: Student, per_token: bool, stats: dict):
        ctx.student, ctx.per_token = student, per_token
        wanted = ctx.needs_input_grad[:3]
        ctx.save_for_backward(hidden, weight, bias, scale)
        if per_token:
            values, _ = run_blocks(student, scale, (False,) * 3, stats)
            return values * scale
        values, ctx.gradients = run_blocks(student, scale, wanted, stats)
        return (values * scale).sum()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("opsdl losses have no second derivative; call backward without create_graph=True")
        hidden, weight, bias, scale = ctx.saved_tensors
        if ctx.per_token:
            _, gradients = run_blocks(ctx.student, scale * grad, ctx.needs_input_grad[:3], {})
            factor = 1.0
        else:
            gradients, factor = ctx.gradients, grad
        cast = (
            None if g is None else (g * factor).to(x.dtype)
            for g, x in zip(gradients, (hidden, weight, bias), strict=True)
        )
        return *cast, None, None, None, None


def run_blocks(
    student: Student, scale_N: Tensor, wanted: tuple[bool, bool, bool], stats: dict
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Values [N] of all tokens and the wanted gradients of sum(values * scale) for hidden, weight, bias.

    Tokens of scale 0 (masked) are left out of every product, so they may hold anything; their values are 0.
    """
    hidden, head = student.hidden, student.head
    vocabulary, wide = head.weight.shape[0], scale_N.dtype
    weight_VH = head.weight.to(wide)
    grad_hidden = torch.zeros_like(hidden, dtype=wide) if wanted[0] else None
    grad_weight = torch.zeros_like(weight_VH) if wanted[1] else None
    grad_bias = scale_N.new_zeros(vocabulary) if wanted[2] else None
    values_N = torch.zeros_like(scale_N)
    step = max(1, BLOCK_BYTES // (student.shards.largest * scale_N.element_size()))  # the same on every rank
    for block_n in scale_N.nonzero().squeeze(1).split(step):
        hidden_nH = hidden[block_n].to(wide)
        z_nV, slope = cap(logits(hidden_nH, weight_VH, head.bias), head)
        value_n, stats_n, gradient = student.block_loss(block_n, z_nV)
        values_N[block_n] = value_n
        for name, stat_n in stats_n.items():
            stats.setdefault(name, torch.zeros_like(scale_N))[block_n] = stat_n
        if any(wanted):
            grad_nV = gradient().mul_(scale_N[block_n, None] / head.temperature)
            if slope is not None:
                grad_nV *= slope
            if student.skip_tolerance > 0:
                kept = keep_tokens(grad_nV, student)
                stats.setdefault("skipped", torch.zeros_like(scale_N, dtype=torch.bool))[block_n] = ~kept
                grad_nV, hidden_nH, block_n = grad_nV[kept], hidden_nH[kept], block_n[kept]
            if wanted[0]:
                grad_hidden[block_n] = grad_nV @ weight_VH
            if wanted[1]:
                grad_weight.addmm_(grad_nV.T, hidden_nH)
            if wanted[2]:
                grad_bias += grad_nV.sum(0)
    if wanted[0]:
        student.shards.sum(grad_hidden)
    return values_N, (grad_hidden, grad_weight, grad_bias)


def keep_tokens(grad_nV: Tensor, student: Student) -> Tensor:
    """[n] bool: False for the tokens that together hold no more than tolerance^2 of the gradient's squared norm."""
    energy_n = student.shards.sum(grad_nV.square().sum(-1))
    ordered, order = energy_n.sort()
    skip = ordered.cumsum(0) <= student.skip_tolerance**2 * energy_n.sum()
    return torch.empty_like(skip).scatter_(0, order, ~skip)


def logits(hidden_nH: Tensor, weight_VH: Tensor, bias: Tensor | None) -> Tensor:
    return hidden_nH @ weight_VH.T if bias is None else torch.addmm(bias.to(hidden_nH.dtype), hidden_nH, weight_VH.T)


def cap(raw_nV: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Soft cap and temperature: (logits, d capped / d raw or None where it is 1)."""
    if head.softcap is None:
        return raw_nV / head.temperature if head.temperature != 1 else raw_nV, None
    tanh = torch.tanh(raw_nV / head.softcap)
    return tanh * (head.softcap / head.temperature), 1 - tanh * tanh
