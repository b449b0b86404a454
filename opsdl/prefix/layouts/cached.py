"""The layouts of a stream: a prefix alone, and rows over cached prefixes; a prefix with its rows is in tree.py.

Each layout answers `attend(layer, query, key, value, scale)` for the tokens of its stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.prefix.layouts.rows import CausalAttention, RowsAttention
from opsdl.prefix.responses import KeyValue, Ragged


class PrefixLayout:
    """A prefix by itself; keeps every layer's keys and values."""

    def __init__(self):
        self.layers: dict[int, KeyValue] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.layers[layer] = (key, value)
        return CausalAttention.apply(query, key, value, scale)


class RowsLayout:
    """Rows alone, each over the keys and values of a cached prefix.

    prefixes: for each prefix its layers, and how many consecutive packed tokens are of its rows.
    """

    def __init__(self, rows: Ragged, prefixes: list[tuple[dict[int, KeyValue], int]]):
        self.rows, self.prefixes = rows, prefixes

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        cached = [x for layers, _ in self.prefixes for x in layers[layer]]
        counts = [count for _, count in self.prefixes]
        return RowsAttention.apply(query, key, value, self.rows, counts, scale, *cached)


class ExtendLayout:
    """Several continuations of one cached prefix, a row each; keeps for each the keys and values of the whole."""

    def __init__(self, rows: Ragged, cached: dict[int, KeyValue]):
        self.cached, self.lengths = cached, rows.mask.sum(1).tolist()
        self.over = RowsLayout(rows, [(cached, sum(self.lengths))])
        self.layers: list[dict[int, KeyValue]] = [{} for _ in self.lengths]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        old_key, old_value = self.cached[layer]
        news = zip(key.split(self.lengths, 2), value.split(self.lengths, 2), strict=True)
        for layers, (new_key, new_value) in zip(self.layers, news, strict=True):
            layers[layer] = (torch.cat([old_key, new_key], 2), torch.cat([old_value, new_value], 2))
        return self.over.attend(layer, query, key, value, scale)
