"""The layout of decoding: responses that grow by a token a step, over cached prefixes that are read once a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsdl.prefix.attention import partial, states
from opsdl.prefix.layouts.stream import put, take
from opsdl.prefix.memory.cache import PooledPart, PrefixCache, by_part
from opsdl.prefix.memory.pool import KeyValuePool


class DecodeLayout:
    """R responses, `count` of each cached prefix, their own tokens in the blocks of a pool.

    What prefixes share is read once for all of their responses. Where all prefixes end in one pool the responses are
    forks there; otherwise they get a pool of their own. Used as a context, so that the responses' blocks are free again
    however decoding ends.
    """

    def __init__(self, prefixes: Sequence[PrefixCache], count: int, max_new_tokens: int) -> None:
        self.prefixes, self.counts = prefixes, [count] * len(prefixes)
        ends = [prefix.parts[-1] for prefix in prefixes]
        pooled = [end for end in ends if isinstance(end, PooledPart)]
        if len(pooled) == len(ends) and all(end.pool is pooled[0].pool for end in pooled):
            self.pool = pooled[0].pool
            self.sequences = [self.pool.fork(end.sequence) for end in pooled for _ in range(count)]
        else:
            self.pool = KeyValuePool.of(ends[0].layers, len(prefixes) * count, max_new_tokens)
            self.sequences = [self.pool.create() for _ in range(len(prefixes) * count)]
        # Where the responses' own tokens are, those of this step included.
        self.slots_RT = torch.empty(len(self.sequences), 0, dtype=torch.int64, device=prefixes[0].tokens.device)
        self.parts = by_part(self.prefixes, self.counts)

    def __enter__(self) -> DecodeLayout:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.free(self.sequences)

    def grow(self) -> None:
        """Begin a step: make room for a token in every response."""
        self.slots_RT = torch.cat([self.slots_RT, self.pool.extend(self.sequences, 1)[:, None]], 1)

    def keep(self, alive_R: Tensor) -> None:
        """Free the responses that are False in `alive_R` [R]."""
        alive = alive_R.tolist()
        self.pool.free([sequence for sequence, stays in zip(self.sequences, alive, strict=True) if not stays])
        self.sequences = [sequence for sequence, stays in zip(self.sequences, alive, strict=True) if stays]
        self.counts = [int(of_prefix.sum()) for of_prefix in alive_R.split(self.counts)]
        self.slots_RT = self.slots_RT[alive_R]
        self.parts = [
            (number, part, filled)
            for number, part, runs in by_part(self.prefixes, self.counts)
            if (filled := [(start, end) for start, end in runs if end > start])
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend with query [R, Hq, 1, D], key and value [R, Hkv, 1, D] of this step's tokens."""
        self.pool.write(layer, self.slots_RT[:, -1], key[:, :, 0], value[:, :, 0])
        own_key, own_value = self.pool.at(layer, self.slots_RT)
        own_out, own_lse = partial.attend(query, own_key, own_value, scale, causal=False)
        query_RHD = query[:, :, 0]
        count = 1 + max(number for number, *_ in self.parts) + 1
        # A prefix of fewer parts than another leaves states without keys, whose out is never read.
        out_SRHD = own_out.new_empty(count, *query_RHD.shape)
        lse_SRH = own_lse.new_full((count, *query_RHD.shape[:2]), -torch.inf)
        out_SRHD[-1], lse_SRH[-1] = own_out[:, :, 0], own_lse[:, :, 0]
        for number, part, runs in self.parts:
            out, lse = part.decode(layer, take(query_RHD, runs, 0), scale)
            put(out_SRHD[number], runs, 0, out)
            put(lse_SRH[number], runs, 0, lse)
        out_RHD, _ = states.merge_states(out_SRHD, lse_SRH)
        return out_RHD[:, :, None].to(query.dtype)
