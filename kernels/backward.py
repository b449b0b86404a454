"""The gradient: tiles of logits again, their gradient into a workspace, and from there two products.

Tokens and vocabulary are cut into chunks that fit the workspace; chunks follow one another, so dHidden and dWeight are
sums in a fixed order, in float32, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsdl.kernels.configs import GROUP, Tile, chunks, config
from opsdl.kernels.operands import Operands
from opsdl.kernels.tile import grouped, logits_and_gap, raw_logits


@triton.jit
def gradient_kernel(
    hidden_ptr, weight_ptr, bias_ptr, teacher_ptr, teacher_weight_ptr, teacher_bias_ptr, form_ptr, index_ptr,
    tokens_ptr, top_ptr, log_sum_ptr, mean_gap_ptr, on_gap_ptr, on_prob_ptr, on_token_ptr, grad_ptr,
    N, V, H, K, hidden_stride, weight_stride, teacher_stride, teacher_weight_stride, temperature, softcap,
    first_column, grad_stride,
    HAS_BIAS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, HAS_TOKENS: tl.constexpr,
    CAPPED: tl.constexpr, SHARED: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program writes the gradient for the raw logits of one tile, into grad [N, V] of the chunk."""
    tile_n, tile_v = grouped(tl.cdiv(N, BN), tl.cdiv(V, BV), GROUP)
    row_n, column_v = tile_n * BN + tl.arange(0, BN), tile_v * BV + tl.arange(0, BV)
    mask_n, mask_v = row_n < N, column_v < V
    index_n = tl.load(index_ptr + row_n, mask=mask_n, other=0)
    form_n = tl.load(form_ptr + row_n, mask=mask_n, other=0) if SHARED else row_n * 0
    raw, second = raw_logits(
        hidden_ptr, weight_ptr, teacher_ptr, teacher_weight_ptr, index_n, form_n, mask_n, column_v, mask_v,
        H, K, hidden_stride, weight_stride, teacher_stride, teacher_weight_stride,
        HAS_TEACHER, SHARED, ROUNDED, PRECISION, BN, BV, BH,
    )  # fmt: skip
    z, gap_nv, slope = logits_and_gap(
        raw, second, form_n > 0, mask_v, bias_ptr, teacher_bias_ptr, column_v, temperature, softcap,
        HAS_BIAS, HAS_TEACHER, HAS_TEACHER_BIAS, CAPPED,
    )  # fmt: skip
    top_n = tl.load(top_ptr + row_n, mask=mask_n, other=0.0)
    log_sum_n = tl.load(log_sum_ptr + row_n, mask=mask_n, other=0.0)
    mean_gap_n = tl.load(mean_gap_ptr + row_n, mask=mask_n, other=0.0)
    on_gap_n = tl.load(on_gap_ptr + row_n, mask=mask_n, other=0.0)
    on_prob_n = tl.load(on_prob_ptr + row_n, mask=mask_n, other=0.0)
    p = tl.exp((z - top_n[:, None]) - log_sum_n[:, None])
    gap_nv = tl.where(z != -float("inf"), gap_nv, 0.0)
    grad = p * (on_gap_n[:, None] * (gap_nv - mean_gap_n[:, None]) + on_prob_n[:, None])
    if HAS_TOKENS:
        token_n = tl.load(tokens_ptr + row_n, mask=mask_n, other=-1) - first_column
        on_token_n = tl.load(on_token_ptr + row_n, mask=mask_n, other=0.0)
        grad += tl.where(column_v[None, :] == token_n[:, None], on_token_n[:, None], 0.0)
    out = grad_ptr + row_n.to(tl.int64)[:, None] * grad_stride + column_v[None, :]
    tl.store(out, (grad * slope).to(grad_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_v[None, :])


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, a_row, a_column, b_row, c_row, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of C [M, N] (+)= A [M, K] B [K, N], C float32."""
    tile_m, tile_n = grouped(tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    row_m, column_n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    step_k = tl.arange(0, BK)
    mask_m, mask_n = row_m < M, column_n < N
    a = a_ptr + row_m.to(tl.int64)[:, None] * a_row + step_k.to(tl.int64)[None, :] * a_column
    b = b_ptr + step_k.to(tl.int64)[:, None] * b_row + column_n[None, :]
    sum_mn = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = step_k < K - start
        x = tl.load(a, mask=mask_m[:, None] & inside[None, :], other=0.0)
        y = tl.load(b, mask=inside[:, None] & mask_n[None, :], other=0.0)
        sum_mn = tl.dot(x, y, sum_mn, input_precision=PRECISION)
        a += BK * a_column
        b += BK * b_row
    c = c_ptr + row_m.to(tl.int64)[:, None] * c_row + column_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if ADD:
        sum_mn += tl.load(c, mask=mask, other=0.0)
    tl.store(c, sum_mn, mask=mask)


def linear_gradient(
    operands: Operands,
    factors_6N: list[Tensor],
    grad_hidden_MH: Tensor | None,
    grad_weight_VH: Tensor | None,
    grad_bias_V: Tensor | None,
) -> None:
    """Fill the gradients asked for, of the sum of all losses.

    Args:
        operands: What linear_moments had.
        factors_6N: top, log_sum, mean_gap, on_gap, on_prob, on_token of each token, float32, in
            dz = p (on_gap (gap - mean_gap) + on_prob) + on_token [v = token] with p = exp(z - top - log_sum).
        grad_hidden_MH: Of any floating dtype; only what index_N names is written. None leaves it out.
        grad_weight_VH: float32, or None.
        grad_bias_V: float32, or None.
    """
    N, (V, H) = len(operands.index_N), operands.weight_VH.shape
    dtype = operands.hidden_MH.dtype
    tiles = config(dtype, operands.hidden_MH.device)
    tile = tiles.gradient if operands.softcap is None else tiles.capped
    rows, columns = chunks(N, V, H, dtype.itemsize, tile)
    workspace, sum_hidden = operands.empty(rows, columns, dtype=dtype), operands.empty(rows, H)
    hidden = operands.empty(rows, H, dtype=dtype) if grad_weight_VH is not None else None
    if grad_bias_V is not None:
        grad_bias_V.zero_()
    for n in range(0, N, rows):
        some = slice(n, n + rows)
        of_tokens, factors_6n = operands.tokens(some), [x[some] for x in factors_6N]
        count = len(of_tokens.index_N)
        if grad_weight_VH is not None:
            torch.index_select(operands.hidden_MH, 0, of_tokens.index_N, out=hidden[:count])
        for v in range(0, V, columns):
            these = slice(v, v + columns)
            part = of_tokens.entries(these)
            grad_nv = workspace[:count, : len(part.weight_VH)]
            _logit_gradient(part, factors_6n, v, grad_nv, tile)
            if grad_hidden_MH is not None:
                _product(grad_nv, part.weight_VH, sum_hidden[:count], v > 0, tiles.product)
            if grad_weight_VH is not None:
                _product(grad_nv.T, hidden[:count], grad_weight_VH[these], n > 0, tiles.product)
            if grad_bias_V is not None:
                grad_bias_V[these] += grad_nv.sum(0, dtype=torch.float32)
        if grad_hidden_MH is not None:
            grad_hidden_MH[of_tokens.index_N] = sum_hidden[:count].to(grad_hidden_MH.dtype)


def _logit_gradient(operands: Operands, factors_6n: list[Tensor], first: int, grad_nv: Tensor, tile: Tile) -> None:
    N, V = grad_nv.shape
    gradient_kernel[(-(-N // tile.rows) * -(-V // tile.columns),)](
        *operands.pointers(), *factors_6n, grad_nv, *operands.sizes(), first, grad_nv.stride(0), **operands.flags(),
        BN=tile.rows, BV=tile.columns, BH=tile.depth, GROUP=GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _product(a_MK: Tensor, b_KN: Tensor, c_MN: Tensor, add: bool, tile: Tile) -> None:
    (M, K), N = a_MK.shape, b_KN.shape[1]
    product_kernel[(-(-M // tile.rows) * -(-N // tile.columns),)](
        a_MK, b_KN, c_MN, M, N, K, a_MK.stride(0), a_MK.stride(1), b_KN.stride(0), c_MN.stride(0),
        ADD=add, PRECISION="ieee", BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUP=GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
