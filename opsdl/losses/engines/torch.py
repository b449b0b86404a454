"""The losses in torch, any device and dtype: student logits and gaps exist for one block of tokens.

Arithmetic is float32 whatever the inputs (float64 for float64): p (gap - mean gap) is a difference of near equals once
the student has converged, and bf16 logits leave 190 % error in the gradient at KL 4e-5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.losses import moments
from opsdl.losses.call import Call, Gradients
from opsdl.losses.teacher import Head, SecondProduct
from opsdl.losses.values import Factors, jensen_shannon

BLOCK_BYTES = 32 << 20  # of one [block, V] tensor; about six of them live at a time


class TorchEngine:
    """Engine and MixingEngine of engine.py, of whole vocabularies: one part, and whole tokens are left out."""

    panel = 1

    def __init__(self, call: Call, count: int) -> None:
        self.call, wanted = call, call.wanted
        wide, operand = call.wide, call.hidden_NH.dtype
        self.weight_VH = call.head.weight.to(operand).to(wide)
        self.block = max(1, BLOCK_BYTES // (call.shards.largest * self.weight_VH.element_size()))
        self.grad_hidden = call.hidden_NH.new_zeros(call.hidden_NH.shape, dtype=wide) if wanted.hidden else None
        entries, size = self.weight_VH.shape
        self.grad_weight = self.weight_VH.new_zeros(entries + call.padding, size) if wanted.weight else None
        self.grad_bias = self.weight_VH.new_zeros(entries + call.padding) if wanted.bias else None

    def moments(self, index_n: Tensor) -> tuple[Tensor, Tensor]:
        """Implements `Engine.moments` with one part; of the slope zeros are returned."""
        call, head = self.call, self.call.head
        self.index_n, self.hidden_nH = index_n, call.hidden_NH[index_n].to(call.wide)
        raw_nV = _product(self.hidden_nH, self.weight_VH, head.bias)
        self.z_nV, self.slope_nV = _cap(raw_nV, head)
        self.gap_nV = torch.zeros_like(self.z_nV)
        if call.second is not None:
            self.gap_nV = self._gap(raw_nV, call.second.product(index_n))
        picked_3n = self.z_nV.new_zeros(3, len(index_n))
        self.token_n1, token_n = None, call.local_tokens(index_n)
        if token_n is not None:
            self.here_n = (token_n >= 0) & (token_n < self.z_nV.shape[1])
            self.token_n1 = torch.where(self.here_n, token_n, 0)[:, None]
            for place, x_nV in enumerate((self.z_nV, self.gap_nV)):
                picked_3n[place] = torch.where(self.here_n, x_nV.gather(1, self.token_n1)[:, 0], 0.0)
            picked_3n[1].masked_fill_(picked_3n[0] == -torch.inf, -torch.inf)
        return moments.measure(self.z_nV, self.gap_nV)[:, None], picked_3n

    def _gap(self, student_nV: Tensor, second: SecondProduct) -> Tensor:
        """Return student minus teacher logit [n, V], minus the teacher's where the student has -inf (moments.py).

        Under a soft cap tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b) keeps a difference one.
        """
        head, wide = self.call.head, self.call.wide
        hidden_nK = second.hidden_nK.to(wide)
        if second.low_nK is not None:
            hidden_nK = hidden_nK + second.low_nK.to(wide)
        shared = second.weight_VK is head.weight
        weight_VK = self.weight_VH if shared else second.weight_VK.to(second.hidden_nK.dtype).to(wide)
        raw_nV, is_difference = _product(hidden_nK, weight_VK, None), second.difference_n[:, None]
        teacher_nV, _ = _cap(raw_nV if second.bias_V is None else raw_nV + second.bias_V.to(wide), head)
        gap_nV = self.z_nV - teacher_nV
        if is_difference.any():
            difference_nV = raw_nV / head.temperature
            if head.softcap is not None:
                tanh_s, tanh_t, tanh_gap = (
                    torch.tanh(x / head.softcap) for x in (student_nV, student_nV - raw_nV, raw_nV)
                )
                difference_nV = tanh_gap * (1 - tanh_s * tanh_t) * (head.softcap / head.temperature)
            gap_nV = torch.where(is_difference, difference_nV, gap_nV)
            teacher_nV = teacher_nV.masked_fill(is_difference, -torch.inf)  # the same head, so the same -inf
        return torch.where(self.z_nV > -torch.inf, gap_nV, -teacher_nV)

    def mix(self, beta: float, stats: dict[str, Tensor]) -> Tensor:
        """Implements `MixingEngine.mix`."""
        sum_, present = self.call.shards.sum, self.z_nV > -torch.inf
        teacher_nV = torch.where(present, self.z_nV, 0.0) - self.gap_nV
        log_q_nV = (teacher_nV - stats["teacher_top"][:, None]) - stats["teacher_log_sum"][:, None]
        log_ratio_nV = stats["lse_difference"][:, None] - self.gap_nV
        nowhere = ~present & (log_q_nV == -torch.inf)
        log_ratio_nV = torch.where(present, log_ratio_nV, torch.inf).masked_fill(nowhere, 0.0)
        terms_nV, self.mixed_nV = jensen_shannon(beta, self._log_p(stats), log_q_nV, log_ratio_nV)
        self.mixed_sum_n = sum_(self.mixed_nV.sum(-1))
        return sum_(terms_nV.sum(-1))

    def _log_p(self, stats: dict[str, Tensor]) -> Tensor:
        return (self.z_nV - stats["top"][:, None]) - stats["log_sum"][:, None]

    def prepare(self, stats: dict[str, Tensor], factors: Factors) -> None:
        """Implements `Engine.prepare`: computes the gradient for the raw logits of the block."""
        p_nV = self._log_p(stats).exp()
        if self.call.beta == 1:
            centred_nV = torch.where(self.z_nV > -torch.inf, self.gap_nV - stats["mean_gap"][:, None], 0.0)
            grad_nV = p_nV * (factors.on_gap[:, None] * centred_nV + factors.on_prob[:, None])
        else:
            grad_nV = factors.on_gap[:, None] * (self.mixed_nV - p_nV * self.mixed_sum_n[:, None])
        if self.token_n1 is not None:
            grad_nV.scatter_add_(1, self.token_n1, (factors.on_token * self.here_n)[:, None])
        self.grad_nV = grad_nV * ((1 if self.slope_nV is None else self.slope_nV) / self.call.head.temperature)

    def energy(self) -> Tensor:
        """Implements `Engine.energy`, exactly, for whole tokens."""
        return self.grad_nV.square().sum(-1)[None]

    def accumulate(self, kept_sn: Tensor | None) -> None:
        """Implements `Engine.accumulate`."""
        grad_nV, hidden_nH, index_n = self.grad_nV, self.hidden_nH, self.index_n
        if kept_sn is not None:
            grad_nV, hidden_nH, index_n = grad_nV[kept_sn[0]], hidden_nH[kept_sn[0]], index_n[kept_sn[0]]
        if self.grad_hidden is not None:
            self.grad_hidden[index_n] = grad_nV @ self.weight_VH
        if self.grad_weight is not None:
            self.grad_weight[: grad_nV.shape[1]].addmm_(grad_nV.T, hidden_nH)
        if self.grad_bias is not None:
            self.grad_bias[: grad_nV.shape[1]] += grad_nV.sum(0)

    def gradients(self) -> Gradients:
        """Implements `Engine.gradients`."""
        return Gradients(self.grad_hidden, self.grad_weight, self.grad_bias)


def _product(hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    if bias_V is None:
        return hidden_nH @ weight_VH.T
    return torch.addmm(bias_V.to(hidden_nH.dtype), hidden_nH, weight_VH.T)


def _cap(raw_nV: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Apply soft cap and temperature: (logits, d capped / d raw or None where it is 1)."""
    if head.softcap is None:
        return raw_nV / head.temperature if head.temperature != 1 else raw_nV, None
    tanh = torch.tanh(raw_nV / head.softcap)
    z_nV = torch.where(raw_nV == -torch.inf, raw_nV, tanh * (head.softcap / head.temperature))  # padding stays padding
    return z_nV, 1 - tanh * tanh
