"""Attention of a prefix to itself, and of ragged rows over their prefixes and themselves, with an exact backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opsdl.prefix.attention import partial
from opsdl.prefix.responses import Ragged


class CausalAttention(torch.autograd.Function):
    """Causal attention [B, H, L, D] that sums in float32 at least; torch's on a CPU sums dK and dV in bf16."""

    @staticmethod
    def forward(ctx, query, key, value, scale: float):
        out, lse = partial.attend(query, key, value, scale, causal=True)
        out = out.to(query.dtype)  # what the next layer keeps anyway
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        grads = partial.attend_backward(grad_out, *ctx.saved_tensors, ctx.scale, causal=True)
        return *(x.to(grad_out.dtype) for x in grads), None


class RowsAttention(torch.autograd.Function):
    """Rows over (whole prefix, own causal part), each prefix read once for all its rows.

    query [1, Hq, N, D] and key, value [1, Hkv, N, D] hold the packed rows. `counts` [tokens of the rows of each prefix]
    sums to N; `cached` is key, value [1, Hkv, P, D] of each prefix in turn. States and sums are in float32 at least.
    """

    @staticmethod
    def forward(ctx, query, key, value, rows: Ragged, counts: list[int], scale: float, *cached):
        parts = [
            partial.attend(part, prefix_key, prefix_value, scale, causal=False)
            for part, prefix_key, prefix_value in _by_prefix(counts, [query], cached)
        ]
        out_1, lse_1 = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        out_2, lse_2 = partial.attend(*(_pad_rows(rows, x) for x in (query, key, value)), scale, causal=True)
        out, lse = partial.merge(out_1, lse_1, _pack_rows(rows, out_2), _pack_rows(rows, lse_2[..., None])[..., 0])
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *cached)
        ctx.rows, ctx.counts, ctx.scale = rows, counts, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, lse, *cached = ctx.saved_tensors
        rows, scale, dtype = ctx.rows, ctx.scale, query.dtype
        wanted = ctx.needs_input_grad[-len(cached) :: 2]  # False of a detached prefix
        parts = _by_prefix(ctx.counts, [grad_out, query, out, lse], cached)
        grads = [
            partial.attend_backward(grad, query, key, value, out, lse, scale, causal=False, key_value=key_value)
            for (grad, query, out, lse, key, value), key_value in zip(parts, wanted, strict=True)
        ]
        grad_cached = [x.to(dtype) if x.numel() else None for _, *pair in grads for x in pair]
        own = [_pad_rows(rows, x) for x in (grad_out, query, key, value, out)]
        # Empty slots get lse = inf, so their probabilities are exactly 0.
        own_lse = _pad_rows(rows, lse[..., None], fill=torch.inf)[..., 0]
        grad_own_query, grad_key, grad_value = (
            _pack_rows(rows, x) for x in partial.attend_backward(*own, own_lse, scale, causal=True)
        )
        grad_query = torch.cat([grad for grad, *_ in grads], 2) + grad_own_query
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
