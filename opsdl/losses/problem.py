"""One call of a loss as every backend takes it: flat, detached, in the dtype of its matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opsdl.losses.shards import Shards


class Head(NamedTuple):
    """The map from hidden states to logits: softcap * tanh((hidden weight^T + bias) / softcap) / temperature."""

    weight: Tensor  # [V, H], any floating dtype; products take it in the dtype of the hidden states
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None


class Second(NamedTuple):
    """The second product, hidden weight^T: where `difference_N`, the gap of the raw logits; elsewhere the teacher's."""

    hidden_NK: Tensor
    low_NK: Tensor | None  # what bf16 or fp16 left of a difference; its product is added
    weight_VK: Tensor
    bias_V: Tensor | None  # for rows that are no difference
    difference_N: Tensor  # bool

    def rows(self, tokens_n: Tensor) -> Second:
        low_nK = None if self.low_NK is None else self.low_NK[tokens_n]
        return self._replace(
            hidden_NK=self.hidden_NK[tokens_n], low_NK=low_nK, difference_N=self.difference_N[tokens_n]
        )


def kept(dtype: torch.dtype) -> torch.dtype:
    """dtype in which a gradient waits for the factor that the backward brings: float16 might have lost it by then."""
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class Problem:
    """What to compute. kind: "kl", "policy", "policy with kl baseline" or "log_prob"."""

    kind: str
    hidden_NH: Tensor
    head: Head
    second: Second | None  # None for "log_prob"
    tokens_N: Tensor | None
    beta: float
    clip: float | None
    skip_tolerance: float
    shards: Shards
    padding: int  # rows of the student's head after the vocabulary: no logits, zero gradient

    @property
    def wide(self) -> torch.dtype:
        """dtype of everything that is no operand of a matrix product."""
        return torch.float64 if self.hidden_NH.dtype == torch.float64 else torch.float32

    @property
    def grad_dtypes(self) -> list[torch.dtype]:
        """Of dHidden, dWeight and dBias: kept(dtype) of each."""
        bias = self.head.bias if self.head.bias is not None else self.head.weight
        return [kept(x.dtype) for x in (self.hidden_NH, self.head.weight, bias)]

    def local_tokens(self, tokens_n: Tensor) -> Tensor | None:
        """Row of this rank's head for each position's sampled token; outside the head where another rank has it."""
        return None if self.tokens_N is None else self.tokens_N[tokens_n] - self.shards.start


def shared_head(student_NH: Tensor, teacher_NH: Tensor, head: Head) -> Second:
    """The second product when student and teacher have one head: (h_s - h_t) W^T, exact however close the two are.

    A difference of two bf16 numbers takes a second bf16 number to hold, unless they are within a factor of two. Close
    rows get both numbers where they need both. Rows 1/32 and more apart take the teacher's own logits instead, for the
    price of one product: there the subtraction of float32 logits leaves a relative error of about 1e-5.
    """
    if student_NH.dtype in (torch.float32, torch.float64):
        everywhere = torch.ones_like(student_NH[:, 0], dtype=torch.bool)
        return Second(student_NH - teacher_NH, None, head.weight, None, everywhere)
    exact_NH = student_NH.float() - teacher_NH.float()
    high_NH = exact_NH.to(student_NH.dtype)
    left_NH = exact_NH - high_NH.float()
    size_N = torch.linalg.vector_norm(exact_NH, dim=-1)
    difference_N = size_N < torch.linalg.vector_norm(student_NH.float(), dim=-1) / 32
    needs_low_N = difference_N & (torch.linalg.vector_norm(left_NH, dim=-1) > size_N * 2**-16)
    low_NH = torch.where(needs_low_N[:, None], left_NH, 0.0).to(student_NH.dtype)
    return Second(torch.where(difference_N[:, None], high_NH, teacher_NH), low_NH, head.weight, head.bias, difference_N)


def own_head(teacher_NH: Tensor, teacher: Head) -> Second:
    """The second product when the teacher has a head of its own: its raw logits."""
    nowhere = torch.zeros_like(teacher_NH[:, 0], dtype=torch.bool)
    return Second(teacher_NH, None, teacher.weight, teacher.bias, nowhere)
