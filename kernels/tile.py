"""What every kernel does with a tile of logits: rows are tokens n, columns vocabulary entries v, all float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    hidden_ptr, weight_ptr, row_n, mask_n, column_v, mask_v, depth, hidden_stride, weight_stride,
    BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden[row_n] weight[column_v]^T, [BN, BV]; rows and columns outside their masks read zeros."""
    step_h = tl.arange(0, BH)
    hidden = hidden_ptr + row_n.to(tl.int64)[:, None] * hidden_stride + step_h[None, :]
    weight = weight_ptr + column_v.to(tl.int64)[None, :] * weight_stride + step_h[:, None]
    sum_nv = tl.zeros((BN, BV), tl.float32)
    for start in range(0, depth, BH):
        inside = step_h < depth - start
        a = tl.load(hidden + start, mask=mask_n[:, None] & inside[None, :], other=0.0)
        b = tl.load(weight + start, mask=mask_v[None, :] & inside[:, None], other=0.0)
        sum_nv = tl.dot(a, b, sum_nv, input_precision=PRECISION)
    return sum_nv


@triton.jit
def expm1_residual(x):
    """exp(x) - 1 - x with full relative accuracy."""
    series = 1 + x * (1 / 10)
    series = 1 + x * (1 / 9) * series
    series = 1 + x * (1 / 8) * series
    series = 1 + x * (1 / 7) * series
    series = 1 + x * (1 / 6) * series
    series = 1 + x * (1 / 5) * series
    series = 1 + x * (1 / 4) * series
    series = 1 + x * (1 / 3) * series
    return tl.where(tl.abs(x) < 0.5, x * x * 0.5 * series, tl.exp(x) - 1 - x)


@triton.jit
def tanh(x):
    """tanh x = d / (d + 2) with d = exp(2x) - 1."""
    x = tl.minimum(tl.maximum(x, -20.0), 20.0)
    d = expm1_residual(2 * x) + 2 * x
    return d / (d + 2)


@triton.jit
def logits_and_gap(
    raw, second, is_difference_n, mask_v, bias_ptr, gap_bias_ptr, column_v, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_GAP: tl.constexpr, HAS_GAP_BIAS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """(z, gap, slope) from raw products: z = cap tanh(raw / cap) / temperature, slope = dz / draw.

    Where is_difference_n the second product is a difference of raw logits, elsewhere the teacher's raw logits.
    """
    if HAS_BIAS:
        raw += tl.load(bias_ptr + column_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    difference = is_difference_n[:, None]
    if HAS_GAP_BIAS:
        bias_v = tl.load(gap_bias_ptr + column_v, mask=mask_v, other=0.0).to(tl.float32)
        second += tl.where(difference, 0.0, bias_v[None, :])
    if CAPPED:
        # t is tanh(a - b) or tanh b; tanh a - tanh b = t (1 - tanh a tanh b), tanh b = (tanh a - t) / (1 - tanh a t)
        a, t = tanh(raw / softcap), tanh(second / softcap)
        below = (a - t) / (1 - a * t)
        gap = tl.where(difference, t * (1 - a * below), a - t) * (softcap / temperature)
        z = a * (softcap / temperature)
        slope = (1 - a * a) / temperature
    else:
        gap = tl.where(difference, second, raw - second) / temperature
        z = raw / temperature
        slope = 1 / temperature + tl.zeros_like(z)
    present = mask_v[None, :] & (raw > -float("inf"))
    if not HAS_GAP:
        gap = tl.zeros_like(z)
    return tl.where(present, z, -float("inf")), tl.where(present, gap, 0.0), slope


@triton.jit
def merge(top, total, offset, gap, spread, teacher_top, teacher_total, z, gap_nv):
    """Moments of the tile (opsdl/losses/moments.py), merged into those of the tiles before it; all [BN]."""
    tile_top = tl.max(z, 1)
    new_top = tl.maximum(top, tile_top)
    base = tl.where(new_top > -float("inf"), new_top, 0.0)
    below = tl.maximum(z - base[:, None], -128.0)
    e = tl.where(z > -float("inf"), tl.exp(below), 0.0)
    tile_total = tl.sum(e, 1)
    inverse = tl.where(tile_total > 0, 1 / tl.where(tile_total > 0, tile_total, 1.0), 0.0)
    tile_gap = tl.sum(e * gap_nv, 1) * inverse
    tile_spread = tl.sum(e * expm1_residual(tl.minimum(tile_gap[:, None] - gap_nv, 80.0)), 1) * inverse
    tile_offset = tl.sum(e * below, 1) * inverse  # below the new top already

    old_total = tl.where(top > -float("inf"), total * tl.exp(top - base), 0.0)
    new_total = old_total + tile_total
    share = tl.where(new_total > 0, old_total / tl.where(new_total > 0, new_total, 1.0), 0.0)
    tile_share = tl.where(new_total > 0, 1 - share, 0.0)
    new_gap = share * gap + tile_share * tile_gap
    shift, tile_shift = tl.minimum(new_gap - gap, 80.0), tl.minimum(new_gap - tile_gap, 80.0)
    new_spread = share * (expm1_residual(shift) + tl.exp(shift) * spread)
    new_spread += tile_share * (expm1_residual(tile_shift) + tl.exp(tile_shift) * tile_spread)
    new_offset = share * tl.where(share > 0, offset + top - base, 0.0) + tile_share * tile_offset

    teacher = z - gap_nv
    new_teacher_top = tl.maximum(teacher_top, tl.max(teacher, 1))
    teacher_base = tl.where(new_teacher_top > -float("inf"), new_teacher_top, 0.0)
    kept = tl.where(teacher_top > -float("inf"), teacher_total * tl.exp(teacher_top - teacher_base), 0.0)
    tile_teacher = tl.where(z > -float("inf"), tl.exp(tl.maximum(teacher - teacher_base[:, None], -128.0)), 0.0)
    return new_top, new_total, new_offset, new_gap, new_spread, new_teacher_top, kept + tl.sum(tile_teacher, 1)
