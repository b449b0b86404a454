"""The layout of decoding: rows that grow by a token a step, over cached prefixes that are each read once a step."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.prefix.attention import partial, states
from opsdl.prefix.memory.cache import PrefixCache
from opsdl.prefix.memory.pool import KeyValuePool


class DecodeLayout:
    """`count` rows of each cached prefix, their own tokens in the blocks of a pool.

    Prefixes that lie in one pool have forks as rows; otherwise the rows get a pool of their own. Used as a context, so
    that the rows' blocks are free again however decoding ends.
    """

    def __init__(self, prefixes: list[PrefixCache], count: int, max_new_tokens: int):
        self.prefixes = [(_Prefix(prefix), count) for prefix in prefixes]
        self.pool = prefixes[0].pool
        if self.pool is None or any(prefix.pool is not self.pool for prefix in prefixes):
            self.pool = KeyValuePool.of(prefixes[0].layers, len(prefixes) * count, max_new_tokens)
            self.rows = [self.pool.create() for _ in range(len(prefixes) * count)]
        else:
            self.rows = [self.pool.fork(prefix.sequence) for prefix in prefixes for _ in range(count)]
        self.slots_RT: Tensor | None = None  # where the rows' own tokens are, those of this step included

    def __enter__(self) -> DecodeLayout:
        return self

    def __exit__(self, *_) -> None:
        self.pool.free(self.rows)

    def grow(self) -> None:
        """Begin a step: room for a token in every row."""
        slots_R1 = self.pool.extend(self.rows, 1)[:, None]
        self.slots_RT = slots_R1 if self.slots_RT is None else torch.cat([self.slots_RT, slots_R1], 1)

    def keep(self, rows_R: Tensor) -> None:
        """Free the rows that are False in `rows_R` [R]."""
        kept = rows_R.tolist()
        self.pool.free([row for row, stays in zip(self.rows, kept, strict=True) if not stays])
        self.rows = [row for row, stays in zip(self.rows, kept, strict=True) if stays]
        counts = [int(part.sum()) for part in rows_R.split([count for _, count in self.prefixes])]
        self.prefixes = [(prefix, count) for (prefix, _), count in zip(self.prefixes, counts, strict=True) if count]
        self.slots_RT = self.slots_RT[rows_R]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [R, Hq, 1, D], key and value [R, Hkv, 1, D] of this step's tokens."""
        self.pool.write(layer, self.slots_RT[:, -1], key[:, :, 0], value[:, :, 0])
        out_own, lse_own = partial.attend(query, *self.pool.at(layer, self.slots_RT), scale, causal=False)
        groups = query[:, :, 0].split([count for _, count in self.prefixes])
        parts = [prefix.attend(layer, group, scale) for group, (prefix, _) in zip(groups, self.prefixes, strict=True)]
        out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
        out, _ = partial.merge(out[:, :, None], lse[..., None], out_own, lse_own)
        return out.to(query.dtype)


class _Prefix:
    """A prefix as decoding reads it: where it lies, in tensors or in the blocks of a pool."""

    def __init__(self, cache: PrefixCache):
        self.pool, self.length = cache.pool, cache.length - 1
        self.table = None if self.pool is None else self.pool.table(cache.sequence)
        self.layers = cache.layers if self.pool is None else None

    def attend(self, layer: int, query_RHD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if self.pool is None:
            key, value = (x[0].transpose(0, 1) for x in self.layers[layer])
        else:
            key, value = self.pool.pools(layer)
        return states.prefix_decode(query_RHD, key, value, scale, length=self.length, block_table=self.table)
