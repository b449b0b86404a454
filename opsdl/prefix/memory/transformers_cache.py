"""A prefix cache as transformers takes it, so that `model.generate` continues it.

    cache = as_transformers(model, prefix, rows=8)
    model.generate(prefix.tokens.expand(8, -1), past_key_values=cache, max_new_tokens=64)

The responses hold one copy of the prefix and their own tokens. `opsdl.generate` is faster: it also reads the prefix
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from opsdl.prefix.attention.partial import KeyValue
from opsdl.prefix.memory.cache import PrefixCache


def as_transformers(model: PreTrainedModel, prefix: PrefixCache, rows: int) -> Cache:
    """Make a transformers cache of responses that all continue the prefix; what they add does not touch it.

    It holds all but the last token of the prefix: the model is to be called with that one, which `generate` does. Of a
    prefix in blocks of a pool that are not consecutive it holds a copy.

    Args:
        model: The model that made the prefix.
        prefix: The cache to continue.
        rows: How many sequences continue it: the batch size of the calls, in transformers' words.

    Returns:
        The cache, for `past_key_values`.

    Raises:
        StalePrefixError: Other weights than the prefix was made by.
        FreedSequenceError: The prefix was freed.
        ValueError: Fewer than one row.
    """
    prefix.check(model)
    if rows < 1:
        raise ValueError(f"rows: {rows}; expected 1 or more")
    parts = [part.layers for part in prefix.parts]
    return Cache(layers=[_SharedLayer([part[layer] for part in parts], rows) for layer in sorted(parts[0])])


class _SharedLayer(DynamicLayer):
    """keys and values are the responses' own [R, Hkv, t, D]; what a call gets has the prefix in front of them."""

    is_croppable = False

    def __init__(self, parts: Sequence[KeyValue], rows: int) -> None:
        super().__init__()
        keys, values = zip(*parts, strict=True)
        self.prefix_keys, self.prefix_values = (
            [x.detach().expand(rows, -1, -1, -1) for x in of_parts] for of_parts in (keys, values)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        return torch.cat([*self.prefix_keys, keys], -2), torch.cat([*self.prefix_values, values], -2)

    def get_seq_length(self) -> int:
        return sum(key.shape[-2] for key in self.prefix_keys) + super().get_seq_length()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:  # the prefix is the same for every response
            super().reorder_cache(beam_idx)
