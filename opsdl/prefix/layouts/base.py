"""What every layout is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Layout(Protocol):
    """Who attends to whom among the tokens of one model call, and over which keys and values made before.

    The adapter hands each attention layer's queries, keys and values to the layout of the call. A layout that wraps
    another (sequence parallelism, say, which trades a share of the tokens for a share of the heads, calls the inner
    layout, and trades back) may rely on this, and owes it to the inner one:

    * Tokens are complete and in the order of the stream, which only the inner layout knows; positions are already
      rotated into queries and keys.
    * Keys have Hkv heads, not repeated for the query heads that share them; a share of the heads keeps these together.
    * A layout may keep the keys and values that it is given (a prefill does) or bring some that were kept (a cache
      does). Both are of the inner layout's heads, so prefill and use must be wrapped alike.
    * Layers come in ascending order, and under activation checkpointing a second time in the backward; the answer must
      be the same. The call is differentiable in query, key and value, and in what was kept.
    """

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend in one layer.

        Args:
            layer: The number of the layer, from 0.
            query: [B, Hq, L, D]. A packed stream has B = 1; in decoding each of B responses has L = 1 token.
            key: [B, Hkv, L, D] of the same tokens and dtype, Hq a multiple of Hkv.
            value: [B, Hkv, L, D].
            scale: The factor of the scores before the softmax.

        Returns:
            The attention's output [B, Hq, L, D] in the dtype of `query`.
        """
        ...
