"""The keys and values of one prefix, made once and used by rollout, student and teacher.

A cache holds all but the last of its prefix's P tokens: the last one is fed with each response, because its output
predicts the response's first token. They lie in one part or, where `extend` made the cache, in the parts of the parent
and one more: prefixes that begin alike share what they have in common, and what reads them reads it once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.prefix.attention import states
from opsdl.prefix.attention.partial import KeyValue
from opsdl.prefix.memory.pool import KeyValuePool


class StalePrefixError(RuntimeError):
    """The weights changed after the prefix cache was made."""


class Part(Protocol):
    """Consecutive tokens of prefixes: their keys and values in every layer, which never change."""

    @property
    def length(self) -> int:
        """How many tokens there are."""

    @property
    def nbytes(self) -> int:
        """The bytes of their keys and values."""

    @property
    def has_gradient(self) -> bool:
        """Whether a backward over these keys and values reaches the tokens."""

    @property
    def place(self) -> Hashable:
        """Equal for parts that are the same tokens in the same place, and only for those."""

    @property
    def layers(self) -> dict[int, KeyValue]:
        """Keys and values [1, Hkv, L, D] by layer."""

    def decode(self, layer: int, query_RHD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The state (out [R, Hq, D], lse [R, Hq]) of R responses' attention to these tokens."""

    def beside(self, layers: dict[int, KeyValue]) -> Part:
        """Make a part of other keys and values, of the same kind."""

    def shared(self) -> Part:
        """The same tokens for one more prefix, to be freed by itself."""

    def check(self) -> None:
        """Raise FreedSequenceError after `free`."""

    def free(self) -> None:
        """Give up this hold on the tokens. Raises FreedSequenceError the second time."""


class OwnPart:
    """A part in tensors of its own, with the graph that made them or without; gone when nothing refers to it."""

    def __init__(self, layers: dict[int, KeyValue]) -> None:
        self.layers = layers
        self.place = id(layers)
        self.length = next(iter(layers.values()))[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in self.layers.values() for x in pair)

    @property
    def has_gradient(self) -> bool:
        return any(key.requires_grad for key, _ in self.layers.values())

    def decode(self, layer: int, query_RHD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        key_LHD, value_LHD = (x[0].transpose(0, 1) for x in self.layers[layer])
        return states.prefix_decode(query_RHD, key_LHD, value_LHD, scale, length=self.length)

    def beside(self, layers: dict[int, KeyValue]) -> OwnPart:
        return OwnPart(layers)

    def shared(self) -> OwnPart:
        return self

    def check(self) -> None:
        pass

    def free(self) -> None:
        pass


class PooledPart:
    """A part in the blocks of a pool, a sequence there, until `free`; without a graph."""

    has_gradient = False

    def __init__(self, pool: KeyValuePool, sequence: int) -> None:
        self.pool, self.sequence = pool, sequence
        self.length = pool.length(sequence)
        self.table = pool.table(sequence)
        self.place = (id(pool), int(self.table[0]))  # parts do not share blocks

    @property
    def nbytes(self) -> int:
        return self.length * self.pool.token_bytes

    @property
    def layers(self) -> dict[int, KeyValue]:
        return self.pool.layers(self.sequence)

    def decode(self, layer: int, query_RHD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        key, value = self.pool.storage(layer)
        return states.prefix_decode(query_RHD, key, value, scale, length=self.length, block_table=self.table)

    def beside(self, layers: dict[int, KeyValue]) -> PooledPart:
        return PooledPart(self.pool, self.pool.store(layers))

    def shared(self) -> PooledPart:
        return PooledPart(self.pool, self.pool.fork(self.sequence))

    def check(self) -> None:
        self.pool.length(self.sequence)

    def free(self) -> None:
        self.pool.free([self.sequence])


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """The keys and values of a prefix; made by `opsdl.prefill` or `opsdl.extend`.

    Args:
        tokens: The prefix, int64 [P].
        parts: Where the keys and values of its first P - 1 tokens lie.
        weights_version: Which weights made them (`weights_version`).
    """

    tokens: Tensor
    parts: tuple[Part, ...]
    weights_version: int

    @property
    def length(self) -> int:
        """P, one more than there are keys."""
        return self.tokens.shape[0]

    @property
    def nbytes(self) -> int:
        """The bytes of the keys and values, those that other prefixes share included."""
        return sum(part.nbytes for part in self.parts)

    @property
    def has_gradient(self) -> bool:
        """Whether a backward over these keys and values reaches all tokens of the prefix."""
        return all(part.has_gradient for part in self.parts)

    @property
    def layers(self) -> dict[int, KeyValue]:
        """Keys and values [1, Hkv, P - 1, D] by layer; a copy if there are several parts.

        Raises:
            FreedSequenceError: The cache was freed.
        """
        parts = [part.layers for part in self.parts]
        if len(parts) == 1:
            return parts[0]
        return {layer: _joined([part[layer] for part in parts]) for layer in parts[0]}

    def check(self, model: PreTrainedModel) -> None:
        """Make sure that this cache serves this model.

        Raises:
            StalePrefixError: Another model, or other weights than those that made the cache.
            FreedSequenceError: The cache was freed.
        """
        if weights_version(model) != self.weights_version:
            raise StalePrefixError(
                "prefix cache: made by other weights than the model has now (another model, or an optimizer step"
                " since); call prefill again"
            )
        for part in self.parts:
            part.check()

    def free(self) -> None:
        """Give the blocks back to the pool, but for those that other caches share; nothing for tensors of its own.

        Raises:
            FreedSequenceError: The cache was freed before.
        """
        for part in self.parts:
            part.free()

    def continued(self, tokens: Tensor, layers: dict[int, KeyValue]) -> PrefixCache:
        """A cache of these tokens [P] that shares the parts of this one; `layers` is of what follows them."""
        own = self.parts[-1].beside(layers)
        return PrefixCache(tokens, (*(part.shared() for part in self.parts), own), self.weights_version)


def weights_version(model: PreTrainedModel) -> int:
    """A number that changes whenever a parameter is written or replaced; autograd counts in-place writes."""
    return hash(tuple((p.data_ptr(), p._version) for p in model.parameters()))


def by_part(prefixes: Sequence[PrefixCache], counts: Sequence[int]) -> list[tuple[int, Part, list[tuple[int, int]]]]:
    """Group what reads prefixes, `counts` items of each in turn, by the parts that are read.

    Returns:
        For each distinct part its number in its prefixes, the part, and the runs of items (first, one after the last)
        that read it.
    """
    found: dict[Hashable, tuple[int, Part, list[tuple[int, int]]]] = {}
    start = 0
    for prefix, count in zip(prefixes, counts, strict=True):
        for number, part in enumerate(prefix.parts):
            *_, runs = found.setdefault(part.place, (number, part, []))
            first = runs.pop()[0] if runs and runs[-1][1] == start else start
            runs.append((first, start + count))
        start += count
    return list(found.values())


def _joined(pairs: Sequence[KeyValue]) -> KeyValue:
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)
