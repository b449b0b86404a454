"""The gradient: tiles of logits again, their gradient into a workspace of 32 MiB, and from there two products.

Tokens and vocabulary are cut into chunks that fit the workspace; chunks follow one another, so dHidden and dWeight are
sums in a fixed order, in float32, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from opsdl.kernels.configs import Tile, chunks, config
from opsdl.kernels.tile import logits_and_gap, product
from torch import Tensor


@triton.jit
def gradient_kernel(
    hidden_ptr, weight_ptr, bias_ptr, gap_hidden_ptr, gap_low_ptr, gap_weight_ptr, gap_bias_ptr, difference_ptr, tokens_ptr,
    lse_ptr, mean_gap_ptr, on_gap_ptr, on_prob_ptr, on_token_ptr, grad_ptr, first_column,
    N, V, H, K, hidden_stride, weight_stride, gap_hidden_stride, gap_weight_stride, grad_stride, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_GAP: tl.constexpr, HAS_LOW: tl.constexpr, HAS_GAP_BIAS: tl.constexpr,
    HAS_TOKENS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the gradient for the raw logits of one tile, into grad [N, V] of the chunk."""
    row_n = tl.program_id(0) * BN + tl.arange(0, BN)
    column_v = tl.program_id(1) * BV + tl.arange(0, BV)
    mask_n, mask_v = row_n < N, column_v < V
    is_difference_n = tl.load(difference_ptr + row_n, mask=mask_n, other=0) != 0 if HAS_GAP else row_n < 0
    raw = product(
        hidden_ptr, weight_ptr, row_n, mask_n, column_v, mask_v, H, hidden_stride, weight_stride, BN, BV, BH, PRECISION
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
    lse_n = tl.load(lse_ptr + row_n, mask=mask_n, other=0.0)
    mean_gap_n = tl.load(mean_gap_ptr + row_n, mask=mask_n, other=0.0)
    on_gap_n = tl.load(on_gap_ptr + row_n, mask=mask_n, other=0.0)
    on_prob_n = tl.load(on_prob_ptr + row_n, mask=mask_n, other=0.0)
    p = tl.exp(z - lse_n[:, None])
    grad = p * (on_gap_n[:, None] * (gap_nv - mean_gap_n[:, None]) + on_prob_n[:, None])
    if HAS_TOKENS:
        token_n = tl.load(tokens_ptr + row_n, mask=mask_n, other=-1) - first_column
        on_token_n = tl.load(on_token_ptr + row_n, mask=mask_n, other=0.0)
        grad += tl.where(column_v[None, :] == token_n[:, None], on_token_n[:, None], 0.0)
    out = grad_ptr + row_n.to(tl.int64)[:, None] * grad_stride + column_v[None, :]
    tl.store(out, (grad * slope).to(grad_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_v[None, :])


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, a_row, a_column, b_row, c_row,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """C [M, N] (+)= A [M, K] B [K, N], C float32. Tiles go in groups of GROUP rows, so that B is read from L2."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tl.program_id(0) // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    row_m = (first + within % height) * BM + tl.arange(0, BM)
    column_n = (within // height) * BN + tl.arange(0, BN)
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
    factors_5N: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grad_hidden_NH: Tensor | None,
    grad_weight_VH: Tensor | None,
    grad_bias_V: Tensor | None,
) -> None:
    """Fills the gradients asked for, of sum_n loss_n; weight and head are those of `linear_moments`, and of one dtype.

    factors: lse, mean_gap, on_gap, on_prob, on_token of each token; dz = p (on_gap (gap - mean_gap) + on_prob) + on_token
    [v = token], p = exp(z - lse). grad_hidden is of the dtype of hidden, grad_weight and grad_bias are float32.
    """
    N, H = hidden_NH.shape
    V, tiles = weight_VH.shape[0], config(hidden_NH.dtype, hidden_NH.device)
    rows, columns = chunks(N, V, H, hidden_NH.dtype.itemsize, tiles.gradient)
    workspace = torch.empty(rows, columns, dtype=hidden_NH.dtype, device=hidden_NH.device)
    sum_hidden = torch.empty(rows, H, dtype=torch.float32, device=hidden_NH.device)
    if grad_bias_V is not None:
        grad_bias_V.zero_()
    for n in range(0, N, rows):
        some = slice(n, n + rows)
        by_token = [None if x is None else x[some] for x in (gap_hidden_NK, gap_low_NK, difference_N, tokens_N)]
        for v in range(0, V, columns):
            these = slice(v, v + columns)
            weight_vH = weight_VH[these]
            grad_nv = workspace[: min(rows, N - n), : len(weight_vH)]
            _logit_gradient(
                hidden_NH[some], weight_vH, None if bias_V is None else bias_V[these], by_token,
                None if gap_weight_VK is None else gap_weight_VK[these], None if gap_bias_V is None else gap_bias_V[these],
                [x[some] for x in factors_5N], v, temperature, softcap, grad_nv, tiles.gradient,
            )  # fmt: skip
            if grad_hidden_NH is not None:
                _product(grad_nv, weight_vH, sum_hidden[: len(grad_nv)], v > 0, tiles.product)
            if grad_weight_VH is not None:
                _product(grad_nv.T, hidden_NH[some], grad_weight_VH[these], n > 0, tiles.product)
            if grad_bias_V is not None:
                grad_bias_V[these] += grad_nv.sum(0, dtype=torch.float32)
        if grad_hidden_NH is not None:
            grad_hidden_NH[some] = sum_hidden[: min(rows, N - n)]


def _logit_gradient(
    hidden_nH, weight_vH, bias_v, by_token, gap_weight_vK, gap_bias_v, factors_5n, first, temperature, softcap, grad_nv,
    tile: Tile,
) -> None:  # fmt: skip
    gap_hidden_nK, gap_low_nK, difference_n, tokens_n = by_token
    (N, H), V, has_gap = hidden_nH.shape, len(weight_vH), gap_hidden_nK is not None
    gradient_kernel[(-(-N // tile.rows), -(-V // tile.columns))](
        hidden_nH, weight_vH, bias_v, gap_hidden_nK, gap_low_nK, gap_weight_vK, gap_bias_v, difference_n, tokens_n,
        *factors_5n, grad_nv, first, N, V, H, gap_hidden_nK.shape[1] if has_gap else 0, hidden_nH.stride(0),
        weight_vH.stride(0), gap_hidden_nK.stride(0) if has_gap else 0, gap_weight_vK.stride(0) if has_gap else 0,
        grad_nv.stride(0), temperature, softcap or 1.0,
        HAS_BIAS=bias_v is not None, HAS_GAP=has_gap, HAS_LOW=gap_low_nK is not None, HAS_GAP_BIAS=gap_bias_v is not None,
        HAS_TOKENS=tokens_n is not None, CAPPED=softcap is not None, PRECISION="ieee",
        BN=tile.rows, BV=tile.columns, BH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _product(a_MK: Tensor, b_KN: Tensor, c_MN: Tensor, add: bool, tile: Tile) -> None:
    (M, K), N = a_MK.shape, b_KN.shape[1]
    product_kernel[(-(-M // tile.rows) * -(-N // tile.columns),)](
        a_MK, b_KN, c_MN, M, N, K, a_MK.stride(0), a_MK.stride(1), b_KN.stride(0), c_MN.stride(0),
        ADD=add, PRECISION="ieee", BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUP=8,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
