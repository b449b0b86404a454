"""The layouts of a stream: a prefix alone, a prefix with its rows, rows over cached prefixes, rows that grow.

Each layout answers `attend(layer, query, key, value, scale)` for the tokens of its stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from opsdl.prefix import partial
from opsdl.prefix.rows import Ragged

KeyValue = tuple[Tensor, Tensor]  # [1, Hkv, P, D] each


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )


class PrefixLayout:
    """A prefix by itself; keeps every layer's keys and values."""

    def __init__(self):
        self.layers: dict[int, KeyValue] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.layers[layer] = (key, value)
        return causal(query, key, value, scale)


class PackedLayout:
    """One stream [prefix ; row 1 ; ... ; row G]."""

    def __init__(self, prefix_length: int, rows: Ragged):
        self.prefix_length, self.rows = prefix_length, rows

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        split = [self.prefix_length, query.shape[2] - self.prefix_length]
        (query_P, query_N), (key_P, key_N), (value_P, value_N) = (x.split(split, 2) for x in (query, key, value))
        out_P = causal(query_P, key_P, value_P, scale)
        out_N = RowsAttention.apply(query_N, key_N, value_N, self.rows, [query_N.shape[2]], scale, key_P, value_P)
        return torch.cat([out_P, out_N], dim=2)


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


class RowsAttention(torch.autograd.Function):
    """Rows over (whole prefix, own causal part), each prefix read once for all its rows. Float32 at least inside.

    query [1, Hq, N, D] and key, value [1, Hkv, N, D] hold the packed rows. `counts` [tokens of the rows of each prefix]
    sums to N; `cached` is key, value [1, Hkv, P, D] of each prefix in turn.
    """

    @staticmethod
    def forward(ctx, query, key, value, rows: Ragged, counts: list[int], scale: float, *cached):
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        parts = [
            partial.attend(part, prefix_key.to(wide), prefix_value.to(wide), scale, causal=False)
            for part, prefix_key, prefix_value in _by_prefix(counts, [query.to(wide)], cached)
        ]
        out_1, lse_1 = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        own = [_pad_rows(rows, x.to(wide)) for x in (query, key, value)]
        out_2, lse_2 = partial.attend(*own, scale, causal=True)
        out, lse = partial.merge(out_1, lse_1, _pack_rows(rows, out_2), _pack_rows(rows, lse_2[..., None])[..., 0])
        ctx.save_for_backward(query, key, value, out, lse, *cached)
        ctx.rows, ctx.counts, ctx.scale = rows, counts, scale
        return out.to(query.dtype)

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, lse, *cached = ctx.saved_tensors
        rows, scale, wide, dtype = ctx.rows, ctx.scale, out.dtype, query.dtype
        grad_out = grad_out.to(wide)
        grad_queries, grad_cached = [], []
        inputs = [grad_out, query.to(wide), out, lse]
        for grad_part, query_part, out_part, lse_part, prefix_key, prefix_value in _by_prefix(
            ctx.counts, inputs, cached
        ):
            grads = partial.attend_backward(
                grad_part,
                query_part,
                prefix_key.to(wide),
                prefix_value.to(wide),
                out_part,
                lse_part,
                scale,
                causal=False,
            )
            grad_queries.append(grads[0])
            grad_cached.extend(grad.to(dtype) for grad in grads[1:])
        own = [_pad_rows(rows, x.to(wide)) for x in (grad_out, query, key, value, out)]
        # Empty slots get lse = inf, so their probabilities are exactly 0.
        own_lse = _pad_rows(rows, lse[..., None], fill=torch.inf)[..., 0]
        grad_own_query, grad_key, grad_value = (
            _pack_rows(rows, x) for x in partial.attend_backward(*own, own_lse, scale, causal=True)
        )
        grad_query = torch.cat(grad_queries, 2) + grad_own_query
        return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), None, None, None, *grad_cached


def _by_prefix(counts: list[int], packed: list[Tensor], cached: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """For each prefix: its share of each packed tensor [1, H, N, ...], then its key and value."""
    return zip(*(x.split(counts, 2) for x in packed), cached[::2], cached[1::2], strict=True)


def _pad_rows(rows: Ragged, packed_1HND: Tensor, fill: float = 0.0) -> Tensor:
    """[1, H, N, D] -> [G, H, T, D]."""
    return rows.pad(packed_1HND[0].transpose(0, 1), fill).transpose(1, 2)


def _pack_rows(rows: Ragged, padded_GHTD: Tensor) -> Tensor:
    """[G, H, T, D] -> [1, H, N, D]."""
    return rows.pack(padded_GHTD.transpose(1, 2)).transpose(0, 1)[None]


class DecodeLayout:
    """Rows of one or more cached prefixes that all grow by one token a step; each prefix is read once a step.

    prefixes: for each prefix its layers' keys and values, and how many consecutive rows are its own.
    """

    def __init__(self, prefixes: list[tuple[dict[int, KeyValue], int]], max_steps: int):
        self.prefixes = prefixes
        self.max_steps = max_steps
        self.own: dict[int, KeyValue] = {}  # [R, Hkv, max_steps, D] each
        self.held: dict[int, int] = {}  # tokens that each row holds in that layer

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out_own, lse_own = partial.attend(query, *self._append(layer, key, value), scale, causal=False)
        outs, lses = [], []
        for group, (layers, _) in zip(query.split([count for _, count in self.prefixes]), self.prefixes, strict=True):
            # The group's rows become the queries of one batch over its one prefix.
            out, lse = partial.attend(group.transpose(0, 2), *layers[layer], scale, causal=False)
            outs.append(out.transpose(0, 2))
            lses.append(lse[..., None].transpose(0, 2)[..., 0])
        out, _ = partial.merge(torch.cat(outs), torch.cat(lses), out_own, lse_own)
        return out.to(query.dtype)

    def keep(self, rows_R: Tensor) -> None:
        """Drop the rows that are False in `rows_R` [R]."""
        counts = [int(part.sum()) for part in rows_R.split([count for _, count in self.prefixes])]
        self.prefixes = [(layers, count) for (layers, _), count in zip(self.prefixes, counts, strict=True) if count]
        self.own = {layer: (key[rows_R], value[rows_R]) for layer, (key, value) in self.own.items()}

    def _append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        held = self.held.get(layer, 0)
        if not held:
            shape = (key.shape[0], key.shape[1], self.max_steps, key.shape[3])
            self.own[layer] = (key.new_empty(shape), value.new_empty(shape))
        own_key, own_value = self.own[layer]
        own_key[:, :, held], own_value[:, :, held] = key[:, :, 0], value[:, :, 0]
        self.held[layer] = held + 1
        return own_key[:, :, : held + 1], own_value[:, :, : held + 1]
