"""A prefix cache as transformers takes it, so that `model.generate` continues it.

    cache = as_transformers(model, prefix, rows=8)
    model.generate(prefix.tokens.expand(8, -1), past_key_values=cache, max_new_tokens=64)

The rows hold one copy of the prefix and their own tokens. `opsdl.generate` is faster: it also reads the prefix once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from opsdl.prefix.memory.cache import PrefixCache


def as_transformers(model: PreTrainedModel, prefix: PrefixCache, rows: int) -> Cache:
    """A transformers cache of `rows` rows that all continue the prefix; what they add does not touch the prefix.

    It holds all but the last token of the prefix: the model is to be called with that one, which `generate` does. Of a
    prefix in blocks of a pool that are not consecutive it holds a copy.
    Raises StalePrefixError for other weights than the prefix was made by, FreedSequence for a freed prefix.
    """
    prefix.check(model)
    if rows < 1:
        raise ValueError(f"rows: {rows}; expected 1 or more")
    layers = prefix.layers
    return Cache(layers=[_SharedLayer(*layers[layer], rows) for layer in sorted(layers)])


class _SharedLayer(DynamicLayer):
    """keys and values are the rows' own [R, Hkv, t, D]; what a call gets has the prefix in front of them."""

    is_croppable = False

    def __init__(self, prefix_key: Tensor, prefix_value: Tensor, rows: int):
        super().__init__()
        self.prefix = [x.detach().expand(rows, -1, -1, -1) for x in (prefix_key, prefix_value)]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        own = super().update(key_states, value_states)
        return tuple(torch.cat(pair, -2) for pair in zip(self.prefix, own, strict=True))

    def get_seq_length(self) -> int:
        return self.prefix[0].shape[-2] + super().get_seq_length()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:  # the prefix is the same for every row
            super().reorder_cache(beam_idx)
