"""Attention of ragged rows over their shared prefixes and over themselves, with an exact backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opsdl.prefix import partial
from opsdl.prefix.rows import Ragged


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
