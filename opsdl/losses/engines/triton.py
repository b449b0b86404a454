"""The losses on a GPU: the two passes of kernels/, all tokens in one block; no logits are stored between them."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.losses.call import Problem, SharedHead
from opsdl.losses.values import Factors


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
        dtype = problem.hidden_NH.dtype
        teacher = (None,) * 4
        if isinstance(problem.second, SharedHead):
            # In float32 every token's second product is a difference, to which no bias belongs.
            bias_V = None if dtype == torch.float32 else _contiguous(head.bias)
            teacher = (_rows_contiguous(problem.second.teacher_NH), None, bias_V, problem.second.near(tokens_n))
        elif problem.second is not None:
            own = problem.second.head
            own_weight, own_bias = own.weight.to(dtype).contiguous(), _contiguous(own.bias)
            teacher = (_rows_contiguous(problem.second.teacher_NK), own_weight, own_bias, None)
        self.operands = Operands(
            _rows_contiguous(problem.hidden_NH), head.weight.to(dtype).contiguous(), _contiguous(head.bias), *teacher,
            tokens_n, problem.local_tokens(tokens_n), head.temperature, head.softcap,
        )  # fmt: skip
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

        operands = self.operands
        factors_6n = [*(self.stats[name] for name in ("top", "log_sum", "mean_gap")), *self.factors]
        if kept_1n is not None:
            operands, factors_6n = operands.tokens(kept_1n[0]), [x[kept_1n[0]] for x in factors_6n]
        rows, (want_hidden, want_weight, want_bias) = len(operands.weight_VH), self.wanted
        linear_gradient(
            operands, [x.contiguous() for x in factors_6n], self.grad_hidden if want_hidden else None,
            self.grad_weight[:rows] if want_weight else None, self.grad_bias[:rows] if want_bias else None,
        )  # fmt: skip

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.grad_hidden, self.grad_weight, self.grad_bias


def _rows_contiguous(hidden_NH: Tensor) -> Tensor:
    return hidden_NH if hidden_NH.stride(1) == 1 else hidden_NH.contiguous()


def _contiguous(bias_V: Tensor | None) -> Tensor | None:
    return None if bias_V is None else bias_V.contiguous()
