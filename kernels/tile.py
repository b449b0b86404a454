"""What every kernel does with a tile of logits: rows are tokens n, columns vocabulary entries v, all float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return (m, n) of this program's tile: GROUP tiles of m take turns at each n before others, so L2 serves both."""
    first = tl.program_id(0) // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def product(
    hidden_ptr, weight_ptr, index_n, mask_n, column_v, mask_v, depth, hidden_stride, weight_stride,
    BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return hidden[index_n] weight[column_v]^T, [BN, BV]; outside their masks rows and columns read zeros."""
    step_h = tl.arange(0, BH)
    hidden = hidden_ptr + index_n.to(tl.int64)[:, None] * hidden_stride + step_h[None, :]
    weight = weight_ptr + column_v.to(tl.int64)[None, :] * weight_stride + step_h[:, None]
    sum_nv = tl.zeros((BN, BV), tl.float32)
    for start in range(0, depth, BH):
        inside = step_h < depth - start
        a = tl.load(hidden + start, mask=mask_n[:, None] & inside[None, :], other=0.0)
        b = tl.load(weight + start, mask=mask_v[None, :] & inside[:, None], other=0.0)
        sum_nv = tl.dot(a, b, sum_nv, input_precision=PRECISION)
    return sum_nv


@triton.jit
def shared_products(
    hidden_ptr, teacher_ptr, weight_ptr, index_n, form_n, mask_n, column_v, mask_v, depth, hidden_stride,
    teacher_stride, weight_stride,
    ROUNDED: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return both products with one head, every piece of which is loaded once; form_n says what the second is."""
    step_h = tl.arange(0, BH)
    hidden = hidden_ptr + index_n.to(tl.int64)[:, None] * hidden_stride + step_h[None, :]
    teacher = teacher_ptr + index_n.to(tl.int64)[:, None] * teacher_stride + step_h[None, :]
    weight = weight_ptr + column_v.to(tl.int64)[None, :] * weight_stride + step_h[:, None]
    raw, second = tl.zeros((BN, BV), tl.float32), tl.zeros((BN, BV), tl.float32)
    for start in range(0, depth, BH):
        inside = step_h < depth - start
        mask = mask_n[:, None] & inside[None, :]
        a = tl.load(hidden + start, mask=mask, other=0.0)
        t = tl.load(teacher + start, mask=mask, other=0.0)
        b = tl.load(weight + start, mask=mask_v[None, :] & inside[:, None], other=0.0)
        raw = tl.dot(a, b, raw, input_precision=PRECISION)
        wide = t.to(tl.float32)
        taken = tl.where(form_n[:, None] > 0, a.to(tl.float32) - wide, wide)
        second = tl.dot(taken.to(t.dtype), b, second, input_precision=PRECISION)
    if ROUNDED:
        # Few tokens need what the rounding left, so for most tiles this loop has no step.
        left_n = form_n == 2
        for start in range(0, depth * tl.max(left_n.to(tl.int32), 0), BH):
            inside = step_h < depth - start
            mask = left_n[:, None] & inside[None, :]
            a = tl.load(hidden + start, mask=mask, other=0.0)
            t = tl.load(teacher + start, mask=mask, other=0.0)
            b = tl.load(weight + start, mask=mask_v[None, :] & inside[:, None], other=0.0)
            difference = a.to(tl.float32) - t.to(tl.float32)
            left = difference - difference.to(t.dtype).to(tl.float32)
            second = tl.dot(left.to(t.dtype), b, second, input_precision=PRECISION)
    return raw, second


@triton.jit
def raw_logits(
    hidden_ptr, weight_ptr, teacher_ptr, teacher_weight_ptr, index_n, form_n, mask_n, column_v, mask_v,
    H, K, hidden_stride, weight_stride, teacher_stride, teacher_weight_stride,
    HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Return both raw products of a tile, [BN, BV]; the second is the first where there is no teacher."""
    if SHARED:
        raw, second = shared_products(
            hidden_ptr, teacher_ptr, weight_ptr, index_n, form_n, mask_n, column_v, mask_v, H, hidden_stride,
            teacher_stride, weight_stride, ROUNDED, BN, BV, BH, PRECISION,
        )  # fmt: skip
    else:
        raw = product(
            hidden_ptr, weight_ptr, index_n, mask_n, column_v, mask_v, H, hidden_stride, weight_stride, BN, BV, BH,
            PRECISION,
        )  # fmt: skip
        second = raw
        if HAS_TEACHER:
            second = product(
                teacher_ptr, teacher_weight_ptr, index_n, mask_n, column_v, mask_v, K, teacher_stride,
                teacher_weight_stride, BN, BV, BH, PRECISION,
            )  # fmt: skip
    return raw, second


@triton.jit
def expm1_residual(x):
    """Return exp(x) - 1 - x with full relative accuracy."""
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
    """Return tanh x = d / (d + 2) with d = exp(2x) - 1."""
    x = tl.minimum(tl.maximum(x, -20.0), 20.0)
    d = expm1_residual(2 * x) + 2 * x
    return d / (d + 2)


@triton.jit
def logits_and_gap(
    raw, second, is_difference_n, mask_v, bias_ptr, teacher_bias_ptr, column_v, temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Return (z, gap, slope) from raw products: z = cap tanh(raw / cap) / temperature, slope = dz / draw.

    Where is_difference_n the second product is a difference of raw logits, elsewhere the teacher's raw logits. A raw
    logit of -inf stays one, cap or not; where it is the student's, gap is minus the teacher's logit, which only a
    teacher with a head of its own has there.
    """
    if HAS_BIAS:
        raw += tl.load(bias_ptr + column_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    difference = is_difference_n[:, None]
    if HAS_TEACHER_BIAS:
        bias_v = tl.load(teacher_bias_ptr + column_v, mask=mask_v, other=0.0).to(tl.float32)
        second += tl.where(difference, 0.0, bias_v[None, :])
    if CAPPED:
        # t is tanh(a - b) or tanh b; tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b)
        a, t, below = tanh(raw / softcap), tanh(second / softcap), tanh((raw - second) / softcap)
        gap = tl.where(difference, t * (1 - a * below), a - t) * (softcap / temperature)
        z, teacher = a * (softcap / temperature), t * (softcap / temperature)
        slope = (1 - a * a) / temperature
    else:
        gap = tl.where(difference, second, raw - second) / temperature
        z, teacher = raw / temperature, second / temperature
        slope = 1 / temperature + tl.zeros_like(z)
    z = tl.where(mask_v[None, :] & (raw != -float("inf")), z, -float("inf"))
    if not HAS_TEACHER:
        return z, tl.where(z != -float("inf"), 0.0, float("inf")), slope
    own = mask_v[None, :] & (difference == 0) & (second != -float("inf"))
    gap = tl.where(difference | own, gap, float("inf"))
    return z, tl.where(z != -float("inf"), gap, tl.where(own, -teacher, float("inf"))), slope


@triton.jit
def merge(top, total, offset, gap, spread, teacher_top, teacher_total, z, gap_nv):
    """Merge the moments of the tile (opsdl/losses/moments.py) into those of the tiles before it; all are [BN]."""
    teacher = tl.where(z != -float("inf"), z, 0.0) - gap_nv
    new_teacher_top = tl.maximum(teacher_top, tl.max(teacher, 1))
    teacher_base = tl.where(new_teacher_top > -float("inf"), new_teacher_top, 0.0)
    kept = tl.where(teacher_top > -float("inf"), teacher_total * tl.exp(teacher_top - teacher_base), 0.0)
    kept += tl.sum(tl.exp(tl.maximum(teacher - teacher_base[:, None], -128.0)), 1)

    gap_nv = tl.where(z != -float("inf"), gap_nv, 0.0)
    tile_top = tl.max(z, 1)
    new_top = tl.maximum(top, tile_top)
    base = tl.where(new_top > -float("inf"), new_top, 0.0)
    below = tl.maximum(z - base[:, None], -128.0)
    e = tl.where(z != -float("inf"), tl.exp(below), 0.0)
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
    return new_top, new_total, new_offset, new_gap, new_spread, new_teacher_top, kept
