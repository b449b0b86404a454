"""The losses on a GPU: the two passes of kernels/, all tokens in one block; no logits are stored between them."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.kernels.backward import linear_gradient
from opsdl.kernels.forward import linear_moments
from opsdl.kernels.operands import Operands
from opsdl.losses.call import Call, Gradients
from opsdl.losses.teacher import SharedHead
from opsdl.losses.values import Factors


class TritonEngine:
    """Engine of engine.py with one block; whole tokens are left out, by an estimate of their gradient."""

    panel = 1

    def __init__(self, call: Call, count: int) -> None:
        self.call = call
        self.block = max(1, count)
        device, (padded, size) = call.hidden_NH.device, call.weight_VH.shape
        shape, dtype = call.hidden_NH.shape, call.grad_dtypes[0]
        self.grad_hidden = call.hidden_NH.new_zeros(shape, dtype=dtype) if call.wanted.hidden else None
        self.grad_weight = torch.zeros(padded, size, device=device) if call.wanted.weight else None
        self.grad_bias = torch.zeros(padded, device=device) if call.wanted.bias else None

    def moments(self, index_n: Tensor) -> tuple[Tensor, Tensor]:
        """Implements `Engine.moments` for all tokens at once."""
        call, head = self.call, self.call.head
        dtype = call.hidden_NH.dtype
        teacher_NK, own_weight, teacher_bias, form_n = None, None, None, None
        if isinstance(call.second, SharedHead):
            teacher_NK, form_n = _last_contiguous(call.second.teacher_NH), call.second.gap_form(index_n)
            # In float32 every token's second product is a difference, to which no bias belongs.
            teacher_bias = None if dtype == torch.float32 else _contiguous(head.bias)
        elif call.second is not None:
            own = call.second.head
            teacher_NK, own_weight = _last_contiguous(call.second.teacher_NK), own.weight.to(dtype).contiguous()
            teacher_bias = _contiguous(own.bias)
        self.operands = Operands(
            _last_contiguous(call.hidden_NH), head.weight.to(dtype).contiguous(), _contiguous(head.bias), teacher_NK,
            own_weight, teacher_bias, form_n, index_n, call.local_tokens(index_n), head.temperature, head.softcap,
        )  # fmt: skip
        moments_7sn, picked_3n = linear_moments(self.operands)
        return moments_7sn, picked_3n

    def prepare(self, stats: dict[str, Tensor], factors: Factors) -> None:
        """Implements `Engine.prepare`."""
        self.stats, self.factors = stats, factors

    def energy(self) -> Tensor:
        """Implements `Engine.energy` by an estimate that needs no other pass.

        sum (p c)^2 <= sum p c^2, which is close to 2 KL where the two models are close.
        """
        a_n, b_n, t_n = self.factors
        return (a_n.square() * 2 * self.stats["kl"] + b_n.square() + t_n.square())[None]

    def accumulate(self, kept_sn: Tensor | None) -> None:
        """Implements `Engine.accumulate`."""
        operands = self.operands
        factors_6n = [*(self.stats[name] for name in ("top", "log_sum", "mean_gap")), *self.factors]
        if kept_sn is not None:
            operands, factors_6n = operands.tokens(kept_sn[0]), [x[kept_sn[0]] for x in factors_6n]
        entries = slice(len(operands.weight_VH))
        linear_gradient(
            operands, [x.contiguous() for x in factors_6n], self.grad_hidden,
            None if self.grad_weight is None else self.grad_weight[entries],
            None if self.grad_bias is None else self.grad_bias[entries],
        )  # fmt: skip

    def gradients(self) -> Gradients:
        """Implements `Engine.gradients`."""
        return Gradients(self.grad_hidden, self.grad_weight, self.grad_bias)


def _last_contiguous(hidden_NH: Tensor) -> Tensor:
    return hidden_NH if hidden_NH.stride(1) == 1 else hidden_NH.contiguous()


def _contiguous(bias_V: Tensor | None) -> Tensor | None:
    return None if bias_V is None else bias_V.contiguous()
