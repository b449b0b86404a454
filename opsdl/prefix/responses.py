"""Responses, padded as users see them and packed as the model reads them.

A response feeds the model the last prefix token and then itself without its last token, so that the output for each fed
token is the hidden state that predicts a response token, the first one included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Responses:
    """The G responses of one prefix. Packed, they are N tokens: those of the first response, then of the second, ...

    Args:
        tokens: Token ids, int64 [G, T].
        mask: bool [G, T], False after the end of a response; its end-of-sequence token itself is True.
        log_probs: Natural-log probability of each token under the model at temperature 1, float32 [G, T], or None.

    Raises:
        ValueError: Shapes or dtypes differ from these, or a response is empty or has a gap in its mask.
    """

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor | None = None

    def __post_init__(self) -> None:
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
        """The number of tokens of each response."""
        return self.mask.sum(1).tolist()

    @property
    def packed_tokens(self) -> Tensor:
        """The tokens that the packed hidden states predict, int64 [N]."""
        return self.tokens[self.mask]

    def inputs(self, last_prefix_token: Tensor) -> Tensor:
        """The tokens [N] that the model is fed, whose outputs predict `packed_tokens`."""
        first_G1 = last_prefix_token.reshape(1, 1).expand(self.tokens.shape[0], 1)
        return torch.cat([first_G1, self.tokens[:, :-1]], dim=1)[self.mask]

    def positions(self, first: int) -> Tensor:
        """The position [N] of each fed token in its sequence, when the last prefix token has position `first`."""
        steps_T = torch.arange(first, first + self.tokens.shape[1], device=self.tokens.device)
        return steps_T.expand_as(self.tokens)[self.mask]

    def pad(self, packed_N: Tensor) -> Tensor:
        """Bring packed values [N, ...] into the form [G, T, ...], 0 where there is no token. Differentiable."""
        padded_GT = packed_N.new_zeros((*self.mask.shape, *packed_N.shape[1:]))
        padded_GT[self.mask] = packed_N
        return padded_GT
