"""The layouts of a stream: a prefix alone or extended, a prefix with its rows, rows that grow by one token a step.

Each layout answers `attend(layer, query, key, value, scale)` for the tokens of its stream.
"""

from __future__ import annotations

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


class RowsLayout:
    """One stream [prefix ; row 1 ; ... ; row G], or the rows alone over the keys and values of a cached prefix."""

    def __init__(self, mask_GT: Tensor, prefix_length: int = 0, cached: dict[int, KeyValue] | None = None):
        self.rows = Ragged(mask_GT)
        self.prefix_length = prefix_length  # prefix tokens at the head of this stream; 0 with a cache
        self.cached = cached

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.cached is not None:
            prefix_key, prefix_value = self.cached[layer]
            return RowsAttention.apply(query, prefix_key, prefix_value, key, value, self.rows, scale)
        split = [self.prefix_length, query.shape[2] - self.prefix_length]
        (query_P, query_N), (key_P, key_N), (value_P, value_N) = (x.split(split, 2) for x in (query, key, value))
        out_P = causal(query_P, key_P, value_P, scale)
        out_N = RowsAttention.apply(query_N, key_P, value_P, key_N, value_N, self.rows, scale)
        return torch.cat([out_P, out_N], dim=2)


class ExtendLayout:
    """Tokens that follow a cached prefix, as one row over it; keeps the keys and values of the whole, old and new."""

    def __init__(self, count: int, cached: dict[int, KeyValue], device: torch.device):
        self.row = RowsLayout(torch.ones(1, count, dtype=torch.bool, device=device), cached=cached)
        self.layers: dict[int, KeyValue] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        old_key, old_value = self.row.cached[layer]
        self.layers[layer] = (torch.cat([old_key, key], 2), torch.cat([old_value, value], 2))
        return self.row.attend(layer, query, key, value, scale)


class RowsAttention(torch.autograd.Function):
    """Rows over (whole prefix, own causal part), prefix read once for all rows. Arithmetic in float32 at least.

    query [1, Hq, N, D] and key, value [1, Hkv, N, D] hold the packed rows; prefix_key, prefix_value are
    [1, Hkv, P, D].
    """

    @staticmethod
    def forward(ctx, query, prefix_key, prefix_value, key, value, rows: Ragged, scale: float):
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        query_N, key_P, value_P = query.to(wide), prefix_key.to(wide), prefix_value.to(wide)
        own = [_pad_rows(rows, x.to(wide)) for x in (query, key, value)]
        out_1, lse_1 = partial.attend(query_N, key_P, value_P, scale, causal=False)
        out_2, lse_2 = partial.attend(*own, scale, causal=True)
        out, lse = partial.merge(out_1, lse_1, _pack_rows(rows, out_2), _pack_rows(rows, lse_2[..., None])[..., 0])
        ctx.save_for_backward(query, prefix_key, prefix_value, key, value, out, lse)
        ctx.rows, ctx.scale = rows, scale
        return out.to(query.dtype)

    @staticmethod
    def backward(ctx, grad_out):
        query, prefix_key, prefix_value, key, value, out, lse = ctx.saved_tensors
        rows, scale, wide = ctx.rows, ctx.scale, out.dtype
        grad_out = grad_out.to(wide)
        grad_query, grad_prefix_key, grad_prefix_value = partial.attend_backward(
            grad_out, query.to(wide), prefix_key.to(wide), prefix_value.to(wide), out, lse, scale, causal=False
        )
        own = [_pad_rows(rows, x.to(wide)) for x in (grad_out, query, key, value, out)]
        # Empty slots get lse = inf, so their probabilities are exactly 0.
        own_lse = _pad_rows(rows, lse[..., None], fill=torch.inf)[..., 0]
        grad_own_query, grad_key, grad_value = (
            _pack_rows(rows, x) for x in partial.attend_backward(*own, own_lse, scale, causal=True)
        )
        return (
            (grad_query + grad_own_query).to(query.dtype),
            grad_prefix_key.to(query.dtype),
            grad_prefix_value.to(query.dtype),
            grad_key.to(query.dtype),
            grad_value.to(query.dtype),
            None,
            None,
        )


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
