"""One pass over the vocabulary: both products of every tile, and of the tile only its moments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from opsdl.kernels.configs import config, splits
from opsdl.kernels.tile import logits_and_gap, merge, product
from torch import Tensor


@triton.jit
def moments_kernel(
    hidden_ptr, weight_ptr, bias_ptr, gap_hidden_ptr, gap_low_ptr, gap_weight_ptr, gap_bias_ptr, difference_ptr, tokens_ptr,
    moments_ptr, picked_ptr, N, V, H, K, hidden_stride, weight_stride, gap_hidden_stride, gap_weight_stride, tiles_per_split,
    temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_GAP: tl.constexpr, HAS_LOW: tl.constexpr, HAS_GAP_BIAS: tl.constexpr,
    HAS_TOKENS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Program (i, s): BN tokens from i BN, the tiles of split s. moments [7, S, N], picked [3, S, N]."""
    # Neighbouring programs share a split, so that its rows of the head are read from L2.
    row_n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    mask_n = row_n < N
    is_difference_n = tl.load(difference_ptr + row_n, mask=mask_n, other=0) != 0 if HAS_GAP else row_n < 0
    token_n = tl.load(tokens_ptr + row_n, mask=mask_n, other=-1) if HAS_TOKENS else row_n
    top = tl.full((BN,), -float("inf"), tl.float32)
    teacher_top = top
    total, offset, gap = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    spread, teacher_total = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    z_token, gap_token, slope_token = total, total, total
    for tile in range(split * tiles_per_split, min((split + 1) * tiles_per_split, tl.cdiv(V, BV))):
        column_v = tile * BV + tl.arange(0, BV)
        mask_v = column_v < V
        raw = product(
            hidden_ptr,
            weight_ptr,
            row_n,
            mask_n,
            column_v,
            mask_v,
            H,
            hidden_stride,
            weight_stride,
            BN,
            BV,
            BH,
            PRECISION,
        )
        second = raw
        if HAS_GAP:
            second = product(
                gap_hidden_ptr, gap_weight_ptr, row_n, mask_n, column_v, mask_v, K, gap_hidden_stride, gap_weight_stride,
                BN, BV, BH, PRECISION,
            )  # fmt: skip
        if HAS_LOW:
            second += product(
                gap_low_ptr, gap_weight_ptr, row_n, mask_n, column_v, mask_v, K, gap_hidden_stride, gap_weight_stride,
                BN, BV, BH, PRECISION,
            )  # fmt: skip
        z, gap_nv, slope = logits_and_gap(
            raw, second, is_difference_n, mask_v, bias_ptr, gap_bias_ptr, column_v, temperature, softcap,
            HAS_BIAS, HAS_GAP, HAS_GAP_BIAS, CAPPED,
        )  # fmt: skip
        if HAS_TOKENS:
            here = mask_v[None, :] & (column_v[None, :] == token_n[:, None])
            z_token += tl.sum(tl.where(here, z, 0.0), 1)
            gap_token += tl.sum(tl.where(here, gap_nv, 0.0), 1)
            slope_token += tl.sum(tl.where(here, slope, 0.0), 1)
        top, total, offset, gap, spread, teacher_top, teacher_total = merge(
            top, total, offset, gap, spread, teacher_top, teacher_total, z, gap_nv
        )
    field = tl.num_programs(1).to(tl.int64) * N
    out = moments_ptr + split.to(tl.int64) * N + row_n
    tl.store(out, top, mask=mask_n)
    tl.store(out + field, total, mask=mask_n)
    tl.store(out + 2 * field, offset, mask=mask_n)
    tl.store(out + 3 * field, gap, mask=mask_n)
    tl.store(out + 4 * field, spread, mask=mask_n)
    tl.store(out + 5 * field, teacher_top, mask=mask_n)
    tl.store(out + 6 * field, teacher_total, mask=mask_n)
    if HAS_TOKENS:
        out = picked_ptr + split.to(tl.int64) * N + row_n
        tl.store(out, z_token, mask=mask_n)
        tl.store(out + field, gap_token, mask=mask_n)
        tl.store(out + 2 * field, slope_token, mask=mask_n)


def linear_moments(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    gap_hidden_NK: Tensor | None,
    gap_low_NK: Tensor | None,
    gap_weight_VK: Tensor | None,
    gap_bias_V: Tensor | None,
    difference_N: Tensor | None,
    tokens_N: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Moments [7, S, N] of S parts of the vocabulary, and (logit, gap, slope) at the tokens [3, N]; float32.

    hidden and gap_hidden are of one dtype, the last dimension of every matrix contiguous. difference_N (bool) says which
    rows of gap_hidden are differences of hidden states, and which the teacher's; gap_low is added to gap_hidden. A token
    outside the head picks zeros.
    """
    N, H = hidden_NH.shape
    V = weight_VH.shape[0]
    tiles = config(hidden_NH.dtype, hidden_NH.device)
    tile = tiles.moments if softcap is None else tiles.capped
    tile_count = triton.cdiv(V, tile.columns)
    per_split = triton.cdiv(tile_count, splits(N, V, tile))
    parts = triton.cdiv(tile_count, per_split)
    moments_7SN = torch.empty(7, parts, N, dtype=torch.float32, device=hidden_NH.device)
    picked_3SN = torch.zeros(3, parts if tokens_N is not None else 1, N, dtype=torch.float32, device=hidden_NH.device)
    has_gap = gap_hidden_NK is not None
    moments_kernel[(-(-N // tile.rows), parts)](
        hidden_NH, weight_VH, bias_V, gap_hidden_NK, gap_low_NK, gap_weight_VK, gap_bias_V, difference_N, tokens_N,
        moments_7SN, picked_3SN, N, V, H, gap_hidden_NK.shape[1] if has_gap else 0, hidden_NH.stride(0), weight_VH.stride(0),
        gap_hidden_NK.stride(0) if has_gap else 0, gap_weight_VK.stride(0) if has_gap else 0, per_split,
        temperature, softcap or 1.0,
        HAS_BIAS=bias_V is not None, HAS_GAP=has_gap, HAS_LOW=gap_low_NK is not None, HAS_GAP_BIAS=gap_bias_V is not None,
        HAS_TOKENS=tokens_N is not None, CAPPED=softcap is not None, PRECISION="ieee",
        BN=tile.rows, BV=tile.columns, BH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return moments_7SN, picked_3SN.sum(1)
