"""How the teacher enters: the second product that every tile of the vocabulary needs beside the student's logits.

With a head of its own the teacher's raw logits are that product, and the gap is a difference of float32 logits. With
one head for both, the product is that of the difference of the hidden states: exact however close the two are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GAP_FORM_BYTES = 32 << 20  # that SharedHead.gap_form takes

# What a token's second product is with a shared head: SharedHead.gap_form, and the kernels' gap_form_N.
TEACHER_LOGITS, DIFFERENCE, DIFFERENCE_IN_TWO = range(3)


class Head(NamedTuple):
    """The map from hidden states to logits: softcap * tanh((hidden weight^T + bias) / softcap) / temperature."""

    weight: Tensor  # [V, H], any floating dtype; products take it in the dtype of the hidden states
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None


class SecondProduct(NamedTuple):
    """The operands of some tokens: where `difference_n`, for the gap of raw logits; elsewhere for the teacher's."""

    hidden_nK: Tensor
    low_nK: Tensor | None  # what bf16 or fp16 left of a difference; its product is added
    weight_VK: Tensor
    bias_V: Tensor | None  # for tokens whose product is no difference
    difference_n: Tensor  # bool


@dataclass(frozen=True)
class SharedHead:
    """Student and teacher have one head: the second product is (h_s - h_t) W^T.

    A difference of two bf16 numbers takes a second bf16 number to hold, unless they are within a factor of two. Close
    tokens get both numbers where they need both. Tokens 1/32 and more apart take the teacher's own logits instead, for
    the price of one product: there the subtraction of float32 logits leaves a relative error of about 1e-5.
    """

    student_NH: Tensor
    teacher_NH: Tensor
    head: Head

    @property
    def size(self) -> int:
        return self.teacher_NH.shape[1]

    def product(self, index_n: Tensor) -> SecondProduct:
        """Return the operands of the tokens with these numbers."""
        student_nH, teacher_nH = self.student_NH[index_n], self.teacher_NH[index_n]
        dtype, head = student_nH.dtype, self.head
        if dtype in (torch.float32, torch.float64):
            everywhere = torch.ones_like(index_n, dtype=torch.bool)
            return SecondProduct(student_nH - teacher_nH, None, head.weight, None, everywhere)
        exact_nH = student_nH.float() - teacher_nH.float()
        high_nH = exact_nH.to(dtype)
        left_nH = exact_nH - high_nH.float()
        form_n = _gap_form(student_nH, exact_nH, left_nH)
        is_difference_n = form_n != TEACHER_LOGITS
        low_nH = torch.where((form_n == DIFFERENCE_IN_TWO)[:, None], left_nH, 0.0).to(dtype)
        hidden_nH = torch.where(is_difference_n[:, None], high_nH, teacher_nH)
        return SecondProduct(hidden_nH, low_nH, head.weight, head.bias, is_difference_n)

    def gap_form(self, index_n: Tensor) -> Tensor:
        """Say what `product` takes for each of these tokens, [n] int8.

        TEACHER_LOGITS: the teacher's hidden states; DIFFERENCE: the difference of the hidden states in one number;
        DIFFERENCE_IN_TWO: in two, the second of which is what rounding left of the first.
        """
        if self.student_NH.dtype in (torch.float32, torch.float64):
            return torch.full_like(index_n, DIFFERENCE, dtype=torch.int8)
        form_n = torch.empty_like(index_n, dtype=torch.int8)
        some = max(1, GAP_FORM_BYTES // (16 * self.size))  # at once: four float32 numbers of each hidden unit
        for part_n, out_n in zip(index_n.split(some), form_n.split(some), strict=True):
            student_nH, teacher_nH = self.student_NH[part_n], self.teacher_NH[part_n]
            exact_nH = student_nH.float() - teacher_nH.float()
            out_n.copy_(_gap_form(student_nH, exact_nH, exact_nH - exact_nH.to(student_nH.dtype).float()))
        return form_n


def _gap_form(student_nH: Tensor, exact_nH: Tensor, left_nH: Tensor) -> Tensor:
    size_n = torch.linalg.vector_norm(exact_nH, dim=-1)
    close_n = size_n < torch.linalg.vector_norm(student_nH, dim=-1, dtype=torch.float32) / 32
    return close_n.to(torch.int8) * (1 + (torch.linalg.vector_norm(left_nH, dim=-1) > size_n * 2**-16))


@dataclass(frozen=True)
class OwnHead:
    """The teacher has a head of its own: the second product is its raw logits."""

    teacher_NK: Tensor
    head: Head

    @property
    def size(self) -> int:
        return self.teacher_NK.shape[1]

    def product(self, index_n: Tensor) -> SecondProduct:
        """Return the operands of the tokens with these numbers."""
        nowhere = torch.zeros_like(index_n, dtype=torch.bool)
        return SecondProduct(self.teacher_NK[index_n], None, self.head.weight, self.head.bias, nowhere)
