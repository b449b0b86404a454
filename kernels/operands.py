"""What both passes read: hidden states, heads, and what is known of each token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """hidden and gap_hidden, weight and gap_weight are of one dtype, the last dimension of every matrix contiguous.

    z = softcap tanh(raw / softcap) / temperature with raw = hidden weight^T + bias. difference_N (bool) says which rows
    of gap_hidden are differences of hidden states, and which the teacher's, to which gap_bias belongs; gap_low is added
    to gap_hidden, and low_rows_N says where it is not 0.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    gap_hidden_NK: Tensor | None
    gap_low_NK: Tensor | None
    low_rows_N: Tensor | None
    gap_weight_VK: Tensor | None
    gap_bias_V: Tensor | None
    difference_N: Tensor | None
    tokens_N: Tensor | None  # a token outside the head picks zeros
    temperature: float
    softcap: float | None
    same_head: bool  # gap_weight is weight

    @classmethod
    def of(
        cls, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, gap_hidden_NK: Tensor | None,
        gap_low_NK: Tensor | None, gap_weight_VK: Tensor | None, gap_bias_V: Tensor | None, difference_N: Tensor | None,
        tokens_N: Tensor | None, temperature: float, softcap: float | None,
    ) -> Operands:  # fmt: skip
        low_rows_N = None if gap_low_NK is None else (gap_low_NK != 0).any(1)
        return cls(
            hidden_NH, weight_VH, bias_V, gap_hidden_NK, gap_low_NK, low_rows_N, gap_weight_VK, gap_bias_V,
            difference_N, tokens_N, temperature, softcap, gap_weight_VK is weight_VH,
        )  # fmt: skip

    def tokens(self, some: slice | Tensor) -> Operands:
        """Of these tokens only."""
        names = ("hidden_NH", "gap_hidden_NK", "gap_low_NK", "low_rows_N", "difference_N", "tokens_N")
        return self._part(names, some)

    def entries(self, these: slice) -> Operands:
        """Of these vocabulary entries only; `tokens_N` stays as it is."""
        return self._part(("weight_VH", "bias_V", "gap_weight_VK", "gap_bias_V"), these)

    def _part(self, names: tuple[str, ...], index: slice | Tensor) -> Operands:
        given = {name: getattr(self, name) for name in names}
        return self._replace(**{name: None if x is None else x[index].contiguous() for name, x in given.items()})

    # What the kernels take: pointers first, sizes and strides after their own pointers, flags by name.

    def pointers(self) -> tuple[Tensor | None, ...]:
        return self[:10]

    def sizes(self) -> tuple[int | float, ...]:
        (N, H), V = self.hidden_NH.shape, len(self.weight_VH)
        K, *strides = 0, 0, 0
        if self.gap_hidden_NK is not None:
            K, strides = self.gap_hidden_NK.shape[1], [x.stride(0) for x in (self.gap_hidden_NK, self.gap_weight_VK)]
        own = self.hidden_NH.stride(0), self.weight_VH.stride(0)
        return N, V, H, K, *own, *strides, self.temperature, self.softcap or 1.0

    def flags(self) -> dict[str, Any]:
        return {
            "HAS_BIAS": self.bias_V is not None,
            "HAS_GAP": self.gap_hidden_NK is not None,
            "HAS_LOW": self.gap_low_NK is not None,
            "HAS_GAP_BIAS": self.gap_bias_V is not None,
            "HAS_TOKENS": self.tokens_N is not None,
            "CAPPED": self.softcap is not None,
            "SHARED": self.same_head,
            "PRECISION": "ieee",
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.hidden_NH.device)
