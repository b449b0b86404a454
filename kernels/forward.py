"""One pass over the vocabulary: both products of every tile, and of the tile only its moments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsdl.kernels.configs import GROUP, config, splits
from opsdl.kernels.operands import Operands
from opsdl.kernels.tile import grouped, logits_and_gap, merge, raw_logits


@triton.jit
def moments_kernel(
    hidden_ptr, weight_ptr, bias_ptr, teacher_ptr, teacher_weight_ptr, teacher_bias_ptr, form_ptr, index_ptr,
    tokens_ptr, moments_ptr, picked_ptr,
    N, V, H, K, hidden_stride, weight_stride, teacher_stride, teacher_weight_stride, temperature, softcap, splits,
    tiles_per_split,
    HAS_BIAS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, HAS_TOKENS: tl.constexpr,
    CAPPED: tl.constexpr, SHARED: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program takes BN tokens and the tiles of one split of the vocabulary: moments [7, S, N], picked [3, S, N]."""
    tile_n, split = grouped(tl.cdiv(N, BN), splits, GROUP)
    row_n = tile_n * BN + tl.arange(0, BN)
    mask_n = row_n < N
    index_n = tl.load(index_ptr + row_n, mask=mask_n, other=0)
    form_n = tl.load(form_ptr + row_n, mask=mask_n, other=0) if SHARED else row_n * 0
    token_n = tl.load(tokens_ptr + row_n, mask=mask_n, other=-1) if HAS_TOKENS else row_n
    top = tl.full((BN,), -float("inf"), tl.float32)
    teacher_top = top
    total, offset, gap = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    spread, teacher_total = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    z_token, gap_token, slope_token = total, total, total
    for tile in range(split * tiles_per_split, min((split + 1) * tiles_per_split, tl.cdiv(V, BV))):
        column_v = tile * BV + tl.arange(0, BV)
        mask_v = column_v < V
        raw, second = raw_logits(
            hidden_ptr, weight_ptr, teacher_ptr, teacher_weight_ptr, index_n, form_n, mask_n, column_v, mask_v,
            H, K, hidden_stride, weight_stride, teacher_stride, teacher_weight_stride,
            HAS_TEACHER, SHARED, ROUNDED, PRECISION, BN, BV, BH,
        )  # fmt: skip
        z, gap_nv, slope = logits_and_gap(
            raw, second, form_n > 0, mask_v, bias_ptr, teacher_bias_ptr, column_v, temperature, softcap,
            HAS_BIAS, HAS_TEACHER, HAS_TEACHER_BIAS, CAPPED,
        )  # fmt: skip
        if HAS_TOKENS:
            here = mask_v[None, :] & (column_v[None, :] == token_n[:, None])
            z_token += tl.sum(tl.where(here, z, 0.0), 1)
            gap_token += tl.sum(tl.where(here, gap_nv, 0.0), 1)
            slope_token += tl.sum(tl.where(here, slope, 0.0), 1)
        top, total, offset, gap, spread, teacher_top, teacher_total = merge(
            top, total, offset, gap, spread, teacher_top, teacher_total, z, gap_nv
        )
    field = tl.full((), N, tl.int64) * splits
    at = split.to(tl.int64) * N + row_n
    store_moments(moments_ptr + at, field, mask_n, top, total, offset, gap, spread, teacher_top, teacher_total)
    if HAS_TOKENS:
        tl.store(picked_ptr + at, z_token, mask=mask_n)
        tl.store(picked_ptr + at + field, gap_token, mask=mask_n)
        tl.store(picked_ptr + at + 2 * field, slope_token, mask=mask_n)


@triton.jit
def store_moments(out, field, mask_n, top, total, offset, gap, spread, teacher_top, teacher_total):
    """Store the seven moments of the tokens, fields apart."""
    tl.store(out, top, mask=mask_n)
    tl.store(out + field, total, mask=mask_n)
    tl.store(out + 2 * field, offset, mask=mask_n)
    tl.store(out + 3 * field, gap, mask=mask_n)
    tl.store(out + 4 * field, spread, mask=mask_n)
    tl.store(out + 5 * field, teacher_top, mask=mask_n)
    tl.store(out + 6 * field, teacher_total, mask=mask_n)


def linear_moments(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return moments [7, S, N] of S parts of the vocabulary, and (logit, gap, slope) at the tokens [3, N]; float32."""
    N, V = len(operands.index_N), len(operands.weight_VH)
    tiles = config(operands.hidden_MH.dtype, operands.hidden_MH.device)
    tile = tiles.moments if operands.softcap is None else tiles.capped
    tile_count = triton.cdiv(V, tile.columns)
    per_split = triton.cdiv(tile_count, splits(N, V, tile))
    parts = triton.cdiv(tile_count, per_split)
    moments_7SN = operands.empty(7, parts, N)
    picked_3SN = operands.empty(3, parts if operands.tokens_N is not None else 1, N).zero_()
    moments_kernel[(-(-N // tile.rows) * parts,)](
        *operands.pointers(), moments_7SN, picked_3SN, *operands.sizes(), parts, per_split, **operands.flags(),
        BN=tile.rows, BV=tile.columns, BH=tile.depth, GROUP=GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    picked_3N = picked_3SN.sum(1)
    picked_3N[1].masked_fill_(picked_3N[0] == -torch.inf, -torch.inf)
    return moments_7SN, picked_3N
