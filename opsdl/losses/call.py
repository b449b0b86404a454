"""One call of a loss as every backend takes it: flat, detached, in the dtype of its matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opsdl.losses.shards import Shards

NEAR_BYTES = 32 << 20  # that SharedHead.near takes


class Head(NamedTuple):
    """The map from hidden states to logits: softcap * tanh((hidden weight^T + bias) / softcap) / temperature."""

    weight: Tensor  # [V, H], any floating dtype; products take it in the dtype of the hidden states
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None


class Second(NamedTuple):
    """The second product of some tokens: where `difference_n`, the gap of the raw logits; elsewhere the teacher's."""

    hidden_nK: Tensor
    low_nK: Tensor | None  # what bf16 or fp16 left of a difference; its product is added
    weight_VK: Tensor
    bias_V: Tensor | None  # for rows that are no difference
    difference_n: Tensor  # bool


def kept(dtype: torch.dtype) -> torch.dtype:
    """dtype in which a gradient waits for the factor that the backward brings: float16 might have lost it by then."""
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class Problem:
    """What to compute. kind: "kl", "policy", "policy with kl baseline" or "log_prob"."""

    kind: str
    hidden_NH: Tensor
    head: Head
    second: SharedHead | OwnHead | None  # None for "log_prob"
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


@dataclass(frozen=True)
class SharedHead:
    """Student and teacher have one head: the second product is (h_s - h_t) W^T, exact however close the two are.

    A difference of two bf16 numbers takes a second bf16 number to hold, unless they are within a factor of two. Close
    rows get both numbers where they need both. Rows 1/32 and more apart take the teacher's own logits instead, for the
    price of one product: there the subtraction of float32 logits leaves a relative error of about 1e-5.
    """

    student_NH: Tensor
    teacher_NH: Tensor
    head: Head

    @property
    def size(self) -> int:
        return self.teacher_NH.shape[1]

    def rows(self, tokens_n: Tensor) -> Second:
        student_nH, teacher_nH = self.student_NH[tokens_n], self.teacher_NH[tokens_n]
        dtype, head = student_nH.dtype, self.head
        if dtype in (torch.float32, torch.float64):
            everywhere = torch.ones_like(tokens_n, dtype=torch.bool)
            return Second(student_nH - teacher_nH, None, head.weight, None, everywhere)
        exact_nH = student_nH.float() - teacher_nH.float()
        high_nH = exact_nH.to(dtype)
        left_nH = exact_nH - high_nH.float()
        near_n = _near(student_nH, exact_nH, left_nH)
        low_nH = torch.where((near_n == 2)[:, None], left_nH, 0.0).to(dtype)
        hidden_nH = torch.where((near_n > 0)[:, None], high_nH, teacher_nH)
        return Second(hidden_nH, low_nH, head.weight, head.bias, near_n > 0)

    def near(self, tokens_n: Tensor) -> Tensor:
        """[n] int8: 0 where `rows` takes the teacher's logits, 1 where a difference, 2 where one with a low part."""
        if self.student_NH.dtype in (torch.float32, torch.float64):
            return torch.ones_like(tokens_n, dtype=torch.int8)
        near_n = torch.empty_like(tokens_n, dtype=torch.int8)
        some = max(1, NEAR_BYTES // (16 * self.size))  # at once: four float32 numbers of each hidden unit
        for part_n, out_n in zip(tokens_n.split(some), near_n.split(some), strict=True):
            student_nH, teacher_nH = self.student_NH[part_n], self.teacher_NH[part_n]
            exact_nH = student_nH.float() - teacher_nH.float()
            out_n.copy_(_near(student_nH, exact_nH, exact_nH - exact_nH.to(student_nH.dtype).float()))
        return near_n


def _near(student_nH: Tensor, exact_nH: Tensor, left_nH: Tensor) -> Tensor:
    size_n = torch.linalg.vector_norm(exact_nH, dim=-1)
    difference_n = size_n < torch.linalg.vector_norm(student_nH, dim=-1, dtype=torch.float32) / 32
    return difference_n.to(torch.int8) * (1 + (torch.linalg.vector_norm(left_nH, dim=-1) > size_n * 2**-16))


@dataclass(frozen=True)
class OwnHead:
    """The teacher has a head of its own: the second product is its raw logits."""

    teacher_NK: Tensor
    head: Head

    @property
    def size(self) -> int:
        return self.teacher_NK.shape[1]

    def rows(self, tokens_n: Tensor) -> Second:
        nowhere = torch.zeros_like(tokens_n, dtype=torch.bool)
        return Second(self.teacher_NK[tokens_n], None, self.head.weight, self.head.bias, nowhere)
