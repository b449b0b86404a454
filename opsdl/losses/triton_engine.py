"""The losses on a GPU: the two passes of kernels/, all tokens in one block; no logits are stored between them."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.losses.kinds import Factors
from opsdl.losses.problem import Problem


class TritonEngine:
    panel = 1

    def __init__(self, problem: Problem, wanted: tuple[bool, bool, bool], count: int):
        self.problem, self.wanted = problem, wanted
        self.block = max(1, count)
        rows, size = problem.head.weight.shape
        device, padded = problem.hidden_NH.device, rows + problem.padding
        shape, dtype = problem.hidden_NH.shape, problem.grad_dtypes[0]
        self.grad_hidden = problem.hidden_NH.new_zeros(shape, dtype=dtype) if wanted[0] else None
        self.grad_weight = torch.zeros(padded, size, device=device) if wanted[1] else None
        self.grad_bias = torch.zeros(padded, device=device) if wanted[2] else None

    def moments(self, tokens_n: Tensor) -> tuple[Tensor, Tensor]:
        """Of all tokens: moments [7, S, n], and (logit, gap, slope) at the sampled tokens [3, n]."""
        from opsdl.kernels.forward import linear_moments  # imports triton
        from opsdl.kernels.operands import Operands

        problem, head = self.problem, self.problem.head
        self.tokens_n = tokens_n
        operand = problem.hidden_NH.dtype
        weight_VH = head.weight.to(operand).contiguous()
        second = (None,) * 5
        if problem.second is not None:
            rows = problem.second.rows(tokens_n)
            same = rows.weight_VK is head.weight
            gap_weight_VK = weight_VH if same else rows.weight_VK.to(operand).contiguous()
            second = (rows.hidden_nK, rows.low_nK, gap_weight_VK, rows.bias_V, rows.difference_n)
        hidden_nH = problem.hidden_NH[tokens_n]
        self.operands = Operands.of(
            hidden_nH, weight_VH, head.bias, *second, problem.local_tokens(tokens_n), head.temperature, head.softcap
        )
        return linear_moments(self.operands)

    def prepare(self, stats: dict[str, Tensor], factors: Factors) -> None:
        self.stats, self.factors = stats, factors

    def energy(self) -> Tensor:
        """An estimate of the squared norm of each token's gradient, [1, n], without another pass.

        sum (p c)^2 <= sum p c^2, which is close to 2 KL where the two models are close.
        """
        a_n, b_n, t_n = self.factors
        return (a_n.square() * 2 * self.stats["kl"] + b_n.square() + t_n.square())[None]

    def accumulate(self, kept_1n: Tensor | None) -> None:
        """Compute the gradients, of the kept tokens."""
        from opsdl.kernels.backward import linear_gradient

        operands, tokens_n = self.operands, self.tokens_n
        factors_6n = [*(self.stats[name] for name in ("top", "log_sum", "mean_gap")), *self.factors]
        if kept_1n is not None:
            operands, tokens_n = operands.tokens(kept_1n[0]), tokens_n[kept_1n[0]]
            factors_6n = [x[kept_1n[0]] for x in factors_6n]
        rows, (want_hidden, want_weight, want_bias) = len(operands.weight_VH), self.wanted
        grad_nH = operands.empty(*operands.hidden_NH.shape, dtype=self.grad_hidden.dtype) if want_hidden else None
        linear_gradient(
            operands, [x.contiguous() for x in factors_6n], grad_nH, self.grad_weight[:rows] if want_weight else None,
            self.grad_bias[:rows] if want_bias else None,
        )  # fmt: skip
        if want_hidden:
            self.grad_hidden[tokens_n] = grad_nH

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.grad_hidden, self.grad_weight, self.grad_bias
