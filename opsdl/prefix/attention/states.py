"""Merging any number of partial attention states, and a step of decoding over one prefix: what runs without csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.prefix.attention import partial
from opsdl.prefix.attention.operators import fallback


def merge_states(out_SRHD: Tensor, lse_SRH: Tensor) -> tuple[Tensor, Tensor]:
    """Merge S partial states over disjoint keys.

    Args:
        out_SRHD: Partial outputs, float32 or float64. Where the lse is infinite it does not matter what they hold.
        lse_SRH: Their natural-log lse, infinite where a state has no keys.

    Returns:
        out [R, H, D] and lse [R, H] over all keys; 0 and -inf where there are none.

    Raises:
        RuntimeError: Other shapes or dtypes.
    """
    if out_SRHD.is_cuda and out_SRHD.dtype == torch.float64:
        return _merge(out_SRHD, lse_SRH)  # the compiled operator is for float32
    return torch.ops.opsdl.merge_states(out_SRHD, lse_SRH)


def prefix_decode(
    query_RHD: Tensor, key: Tensor, value: Tensor, scale: float, *, length: int, block_table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend with one token of each of R responses to the same keys, which are read once for all of them.

    Args:
        query_RHD: [R, Hq, D].
        key: [L, Hkv, D] with L >= length, or all blocks of a pool [blocks, block_size, Hkv, D].
        value: As the keys.
        scale: The factor of the scores.
        length: How many keys there are.
        block_table: The blocks that hold them, in their order, int32; for a pool.

    Returns:
        out [R, Hq, D] and natural-log lse [R, Hq], float32 (float64 for float64).

    Raises:
        RuntimeError: Other shapes or dtypes, or blocks outside the pool; so does ValueError.
    """
    multiple, most = (8, 128) if query_RHD.is_cuda else (2, 256)  # of the compiled operators
    size = query_RHD.shape[-1]
    if query_RHD.dtype == torch.float64 or size % multiple or size > most:
        return _decode(query_RHD, key, value, block_table, length, scale)
    return torch.ops.opsdl.prefix_decode(query_RHD, key, value, block_table, length, scale)


@fallback("merge_states")
def _merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    empty = lse.isinf()
    lse = lse.masked_fill(empty, -torch.inf)
    merged = lse.logsumexp(0)
    weights = (lse - merged).exp_().masked_fill_(empty, 0.0)
    return (weights[..., None] * out.masked_fill(empty[..., None], 0.0)).sum(0), merged


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
