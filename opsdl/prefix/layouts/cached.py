"""The layouts of a prefill and of what runs over it: a prefix alone, responses, continuations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from opsdl.prefix.attention.partial import KeyValue
from opsdl.prefix.layouts.stream import Run, Stream, StreamAttention
from opsdl.prefix.memory.cache import PrefixCache, by_part


class PrefixLayout:
    """A prefix by itself; keeps every layer's keys and values."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.layers: dict[int, KeyValue] = {}
        self.stream = Stream([(0, length)], device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.layers[layer] = (key, value)
        return StreamAttention.apply(query, key, value, self.stream, scale)


class CachedLayout:
    """Packed sequences, each over its cached prefix; what prefixes share is read once for all of their sequences.

    Args:
        prefixes: The caches, in the order of the stream.
        lengths: For each prefix the lengths of the sequences that follow it.
        detach: Whether the cached keys and values are constants.
    """

    def __init__(
        self, prefixes: Sequence[PrefixCache], lengths: Sequence[Sequence[int]], *, detach: bool = False
    ) -> None:
        parts = by_part(prefixes, [sum(of_prefix) for of_prefix in lengths])
        self.cached, self.detach = [part.layers for _, part, _ in parts], detach
        sequences = _consecutive([length for of_prefix in lengths for length in of_prefix])
        self.stream = Stream(sequences, prefixes[0].tokens.device, readers=[runs for *_, runs in parts])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        outside = [x.detach() if self.detach else x for layers in self.cached for x in layers[layer]]
        return StreamAttention.apply(query, key, value, self.stream, scale, *outside)


class ExtendLayout:
    """Several continuations of one cached prefix; keeps for each of them its own keys and values, and no others."""

    def __init__(self, parent: PrefixCache, lengths: Sequence[int]) -> None:
        self.over, self.lengths = CachedLayout([parent], [lengths]), list(lengths)
        self.own: list[dict[int, KeyValue]] = [{} for _ in lengths]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        pairs = zip(key.split(self.lengths, 2), value.split(self.lengths, 2), strict=True)
        for layers, pair in zip(self.own, pairs, strict=True):
            layers[layer] = pair
        return self.over.attend(layer, query, key, value, scale)


def _consecutive(lengths: Sequence[int]) -> list[Run]:
    ends = list(accumulate(lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True))
