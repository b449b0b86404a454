"""What both passes read: hidden states, heads, and what is known of each token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """Hidden states and heads, of one dtype and with a contiguous last dimension; only the tokens of index_N are read.

    z = softcap tanh(raw / softcap) / temperature with raw = hidden weight^T + bias. Besides raw a tile needs a second
    product. With a head of the teacher's own it is the teacher's raw logits. Where both have one head it is, by token
    (opsdl/losses/teacher.py),

        gap_form_N = 0   the teacher's raw logits, to which teacher_bias belongs
        gap_form_N = 1   (hidden - teacher) weight^T, the difference rounded to the dtype of the operands
        gap_form_N = 2   the same, and the product of what that rounding left is added

    The difference is made in registers: no copy of the hidden states is in memory.
    """

    hidden_MH: Tensor  # M hidden states are given, N of them are computed
    weight_VH: Tensor
    bias_V: Tensor | None
    teacher_MK: Tensor | None
    teacher_weight_VK: Tensor | None  # None: weight_VH
    teacher_bias_V: Tensor | None
    gap_form_N: Tensor | None  # int8; None with a head of the teacher's own
    index_N: Tensor  # int64, which of the M hidden states each token has
    tokens_N: Tensor | None  # int64, the sampled tokens; one outside the head picks zeros
    temperature: float
    softcap: float | None

    def tokens(self, some: slice | Tensor) -> Operands:
        """Return the operands of these tokens only."""
        return self._part(("gap_form_N", "index_N", "tokens_N"), some)

    def entries(self, these: slice) -> Operands:
        """Return the operands of these vocabulary entries only; `tokens_N` stays as it is."""
        return self._part(("weight_VH", "bias_V", "teacher_weight_VK", "teacher_bias_V"), these)

    def _part(self, names: tuple[str, ...], index: slice | Tensor) -> Operands:
        given = {name: getattr(self, name) for name in names}
        return self._replace(**{name: None if x is None else x[index] for name, x in given.items()})

    # What the kernels take: pointers first, sizes and strides after their own pointers, flags by name.

    def pointers(self) -> tuple[Tensor | None, ...]:
        return self[:9]

    def sizes(self) -> tuple[int | float, ...]:
        N, (V, H) = len(self.index_N), self.weight_VH.shape
        K, *strides = 0, 0, 0
        if self.teacher_MK is not None:
            K, strides = self.teacher_MK.shape[1], [self.teacher_MK.stride(0), self._teacher_weight.stride(0)]
        own = self.hidden_MH.stride(0), self.weight_VH.stride(0)
        return N, V, H, K, *own, *strides, self.temperature, self.softcap or 1.0

    def flags(self) -> dict[str, Any]:
        shared = self.gap_form_N is not None
        return {
            "HAS_BIAS": self.bias_V is not None,
            "HAS_TEACHER": self.teacher_MK is not None,
            "HAS_TEACHER_BIAS": self.teacher_bias_V is not None,
            "HAS_TOKENS": self.tokens_N is not None,
            "CAPPED": self.softcap is not None,
            "SHARED": shared,
            "ROUNDED": shared and self.hidden_MH.dtype != torch.float32,  # gap_form_N is 1 everywhere in float32
            "PRECISION": "ieee",
        }

    @property
    def _teacher_weight(self) -> Tensor:
        return self.weight_VH if self.teacher_weight_VK is None else self.teacher_weight_VK

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.hidden_MH.device)
