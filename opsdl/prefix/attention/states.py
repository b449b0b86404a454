"""Merging any number of partial attention states, and a step of decoding over one prefix: what runs without csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.prefix.attention import operators, partial
from opsdl.prefix.attention.operators import fallback


def merge_states(out_SRHD: Tensor, lse_SRH: Tensor) -> tuple[Tensor, Tensor]:
    """Merge S partial states over disjoint keys into out [R, H, D] and lse [R, H]; differentiable.

    All are float32, on a CPU float64 too. An infinite lse is a part without keys, and what its out holds does not
    matter; a row of such parts alone has out 0 and lse -inf. Raises RuntimeError on other shapes and dtypes.
    """
    return torch.ops.opsdl.merge_states(out_SRHD, lse_SRH)


def prefix_decode(
    query_RHD: Tensor, key: Tensor, value: Tensor, scale: float, *, length: int, block_table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of each of R rows over the same `length` keys, which are read once for all of them.

    query [R, Hq, D]; key, value [L, Hkv, D], L >= length, or pools [blocks, block_size, Hkv, D] of which block_table
    int32 lists the blocks in their order. Returns out [R, Hq, D] and natural-log lse [R, Hq], float32 at least.
    Raises RuntimeError or ValueError on other shapes and dtypes, and on blocks outside the pool.
    """
    multiple, most = (8, 128) if query_RHD.is_cuda else (2, 256)  # of the compiled operators
    size = query_RHD.shape[-1]
    if query_RHD.dtype == torch.float64 or size % multiple or size > most:
        return _decode(query_RHD, key, value, block_table, length, scale)
    return torch.ops.opsdl.prefix_decode(query_RHD, key, value, block_table, length, scale)


def _weights(lse_SRH: Tensor, of_all_RH: Tensor) -> Tensor:
    return torch.where(lse_SRH.isinf(), 0.0, (lse_SRH - of_all_RH).exp())


@fallback("merge_states")
def _merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    merged = lse.masked_fill(lse.isinf(), -torch.inf).logsumexp(0)
    weights = _weights(lse, merged)[..., None]
    return torch.where(weights > 0, weights * out, 0.0).sum(0), merged


@fallback("merge_states_backward")
def _merge_backward(
    grad_out: Tensor, grad_lse: Tensor, out_parts: Tensor, lse_parts: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    weights = _weights(lse_parts, lse)
    on_weight = grad_lse + (grad_out * (out_parts - out)).sum(-1)
    return weights[..., None] * grad_out, torch.where(weights > 0, weights * on_weight, 0.0)


@fallback("prefix_decode")
def _decode(
    query: Tensor, key: Tensor, value: Tensor, block_table: Tensor | None, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    if length < 1:
        raise RuntimeError(f"prefix_decode: length {length}; expected above 0")
    if block_table is not None:
        key, value = (torch.ops.opsdl.gather_tokens(x, block_table, length) for x in (key, value))
    by_head = [x.transpose(0, 1)[None] for x in (query, key[:length], value[:length])]
    out, lse = partial.attend_in_torch(*by_head, scale, causal=False)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _keep_states(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _merge_gradient(ctx, grad_out, grad_lse):
    return torch.ops.opsdl.merge_states_backward(grad_out, grad_lse, *ctx.saved_tensors)


operators.autograd("merge_states", _merge_gradient, _keep_states)
