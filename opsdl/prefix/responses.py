"""Responses and the ragged rows they become.

A row is what one response feeds to the model: the last prefix token, then the response without its last token.
So output t of row g is the hidden state that predicts response token t, the first one included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]  # [1, Hkv, P, D] each: the keys and values of a prefix in one layer


@dataclass(frozen=True)
class Responses:
    """The G responses of one prefix.

    tokens: [G, T] int64; mask: [G, T] bool, False after the end (the end-of-sequence token itself is True);
    log_probs: [G, T] float32 or None, log-probability of each token under the model at temperature 1.

    Raises ValueError when shapes or dtypes differ from these, or a response is empty or has a gap in its mask.
    """

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor | None = None

    def __post_init__(self):
        if self.tokens.ndim != 2 or self.tokens.dtype != torch.int64:
            raise ValueError(f"tokens: expected int64 [G, T], found {self.tokens.dtype} {tuple(self.tokens.shape)}")
        if self.mask.shape != self.tokens.shape or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected bool {tuple(self.tokens.shape)}, found {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        empty = (~self.mask.any(1)).nonzero()
        if self.tokens.numel() == 0 or len(empty):
            raise ValueError(f"mask: response {int(empty[0]) if len(empty) else 0} is empty; expected a token in each")
        if (self.mask[:, 1:] & ~self.mask[:, :-1]).any():
            raise ValueError("mask: expected True up to the end of each response and False after it")

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()

    def row_tokens(self, last_prefix_token: Tensor) -> Tensor:
        """[G, T] inputs whose outputs predict `tokens`."""
        first_G1 = last_prefix_token.reshape(1, 1).expand(self.tokens.shape[0], 1)
        return torch.cat([first_G1, self.tokens[:, :-1]], dim=1)


class Ragged:
    """Moves between the padded [G, T] form of ragged rows and the packed [sum of lengths] form."""

    def __init__(self, mask_GT: Tensor):
        self.mask = mask_GT

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Ragged:
        """Rows of these lengths."""
        return cls(torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None])

    @cached_property
    def slots(self) -> Tensor:
        """[N] index into the flattened [G * T] of each packed token."""
        return self.mask.flatten().nonzero().squeeze(1)

    def pack(self, padded_GT: Tensor) -> Tensor:
        """[G, T, ...] -> [N, ...]."""
        return padded_GT.flatten(0, 1).index_select(0, self.slots)

    def pad(self, packed_N: Tensor, fill: float = 0.0) -> Tensor:
        """[N, ...] -> [G, T, ...], `fill` where there is no token. Differentiable."""
        padded = packed_N.new_full((self.mask.numel(), *packed_N.shape[1:]), fill)
        return padded.index_copy(0, self.slots, packed_N).unflatten(0, self.mask.shape)
