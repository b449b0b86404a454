// One tile: 128 vocabulary entries times a panel of 64 tokens, from raw products to moments, and from stored values to the
// gradient. Its rows are vocabulary entries, so sums over the vocabulary run down the columns, 16 tokens to a vector, and
// never across one. The moments are those of opsdl/losses/moments.py, and four more for storage and skipping.
#pragma once

#include "common/gemm.h"
#include "common/vec.h"

namespace opsdl {

constexpr int64_t kEntries = 128;

// Fields of the moments tensor [kFields, tiles, tokens]. GAP_SCALE: what stored e * (gap - GAP) was divided by.
// SQUARE_k: sum (e slope)^2 (gap - GAP)^k, from which the squared norm of the token's gradient follows.
enum Field { kMax, kSum, kOffset, kGap, kSpread, kTeacherMax, kTeacherSum, kGapScale, kSquare0, kSquare1, kSquare2, kFields };

// z = cap * tanh(raw / cap) / temperature; without the tanh where cap is 0.
struct LogitMap {
  float temperature, cap;
};

// Raw products of 16 tokens become logits and gaps, in place; entries are kPanel floats apart. `gap` may be null.
// difference: 1 for a token whose second product is the difference of raw logits, 0 where it is the teacher's raw logit.
// slope (written with a cap only): dz / draw, times the temperature. A raw logit of -inf stays one, cap or not; where it is
// the student's, gap is minus the teacher's logit. The same head has the same -inf, so a difference says nothing there.
inline void to_logits(int64_t entries, LogitMap map, const float* bias, const float* gap_bias, Vec difference, float* z,
                      float* gap, float* slope) {
  const Vec one = splat(1.f), minus_inf = splat(kNegInf), shrink = splat(1.f / map.temperature);
  const Vec inverse = splat(1.f / map.cap), grow = splat(map.cap / map.temperature);
  const Vec zero = _mm512_setzero_ps();
  const __mmask16 apart = _mm512_cmp_ps_mask(difference, one, _CMP_NEQ_OQ);
  for (int64_t v = 0; v < entries; ++v, z += kPanel, slope += kPanel) {
    Vec raw = load(z), second = gap ? load(gap) : one;
    if (bias) raw += splat(bias[v]);
    if (gap_bias) second = _mm512_mask_add_ps(second, apart, second, splat(gap_bias[v]));
    Vec logit, between, teacher;  // teacher: where apart
    if (map.cap > 0) {
      // gap = tanh a - tanh b; from a difference, tanh(a - b) gives it without cancellation:
      // tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b).
      const Vec a = tanh(raw * inverse), t = tanh(second * inverse), b = tanh((raw - second) * inverse);
      logit = a * grow;
      between = _mm512_mask_sub_ps(t * (one - a * b), apart, a, t) * grow;
      teacher = t * grow;
      store(slope, one - a * a);
    } else {
      logit = raw * shrink;
      between = _mm512_mask_sub_ps(second, apart, raw, second) * shrink;
      teacher = second * shrink;
    }
    const __mmask16 padding = _mm512_cmp_ps_mask(raw, minus_inf, _CMP_EQ_OQ);
    store(z, _mm512_mask_blend_ps(padding, logit, minus_inf));
    if (gap) {
      const __mmask16 nowhere = apart & _mm512_cmp_ps_mask(second, minus_inf, _CMP_EQ_OQ);
      const Vec lost = _mm512_mask_blend_ps(apart & ~nowhere, zero - minus_inf, zero - teacher);
      between = _mm512_mask_blend_ps(nowhere, between, zero - minus_inf);
      store(gap, _mm512_mask_blend_ps(padding, between, lost));
      gap += kPanel;
    }
  }
}

// From z and gap as to_logits leaves them.
inline Vec teacher_logit(Vec z, Vec gap) {
  const __mmask16 present = _mm512_cmp_ps_mask(z, splat(kNegInf), _CMP_NEQ_UQ);
  return _mm512_maskz_mov_ps(present, z) - gap;
}

// The largest logits of 16 tokens over the tile's entries, -inf where there are none.
struct Tops {
  Vec student, teacher;
};

inline Tops tops_of(int64_t entries, const float* z, const float* gap) {
  Vec top = splat(kNegInf), teacher_top = top;
  for (int64_t v = 0; v < entries; ++v) {
    const Vec logit = load(z + v * kPanel);
    top = _mm512_max_ps(top, logit);
    if (gap) teacher_top = _mm512_max_ps(teacher_top, teacher_logit(logit, load(gap + v * kPanel)));
  }
  return {top, teacher_top};
}

inline Vec finite(Vec top) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(top, splat(kNegInf), _CMP_EQ_OQ), top, _mm512_setzero_ps());
}

// Sums of e = exp(z - top), which takes the place of z, and of what goes with it; gap becomes 0 where z is -inf.
struct Sums {
  Vec e, offset, gap, teacher;
};

inline Sums sums_of(int64_t entries, Tops tops, float* z, float* gap) {
  const Vec zero = _mm512_setzero_ps(), least = splat(-128.f);  // exp(-128) is 0
  const Vec base = finite(tops.student), teacher_base = finite(tops.teacher);
  Vec sum = zero, offset = zero, gap_sum = zero, teacher_sum = zero;
  for (int64_t v = 0; v < entries; ++v) {
    const Vec logit = load(z + v * kPanel), below = _mm512_max_ps(least, logit - base), e = exp(below);
    sum += e;
    offset = _mm512_fmadd_ps(e, below, offset);
    store(z + v * kPanel, e);
    if (gap) {
      const __mmask16 present = _mm512_cmp_ps_mask(logit, splat(kNegInf), _CMP_NEQ_UQ);
      const Vec difference = load(gap + v * kPanel), own = _mm512_maskz_mov_ps(present, difference);
      gap_sum = _mm512_fmadd_ps(e, own, gap_sum);
      teacher_sum += exp(_mm512_max_ps(least, teacher_logit(logit, difference) - teacher_base));
      store(gap + v * kPanel, own);
    }
  }
  return {sum, offset, gap_sum, teacher_sum};
}

// Sums around the mean gap. e slope takes the place of e, and e slope (gap - GAP) that of gap.
struct Spread {
  Vec rho, largest, square0, square1, square2;
};

inline Spread spread_of(int64_t entries, bool capped, Vec centre, float* z, float* gap, const float* slope) {
  const Vec zero = _mm512_setzero_ps();
  Vec rho = zero, largest = zero, square0 = zero, square1 = zero, square2 = zero;
  for (int64_t v = 0; v < entries; ++v) {
    const Vec e = load(z + v * kPanel);
    const Vec weight = capped ? e * load(slope + v * kPanel) : e;
    square0 = _mm512_fmadd_ps(weight, weight, square0);
    if (gap) {
      const Vec centred = load(gap + v * kPanel) - centre, product = weight * centred;
      rho = _mm512_fmadd_ps(e, expm1_residual(_mm512_min_ps(splat(80.f), zero - centred)), rho);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(product));
      square1 = _mm512_fmadd_ps(weight, product, square1);
      square2 = _mm512_fmadd_ps(product, product, square2);
      store(gap + v * kPanel, product);
    }
    store(z + v * kPanel, weight);
  }
  return {rho, largest, square0, square1, square2};
}

// Moments of 16 tokens over the tile's entries, into out[field * stride]. Where e_out is given, stores what the gradient
// needs: e_out = e slope, gap_out = e (gap - GAP) slope / GAP_SCALE, both of magnitude at most 1. z and gap are overwritten.
template <class Storage>
void to_moments(int64_t entries, bool capped, float* z, float* gap, const float* slope, Storage* e_out, Storage* gap_out,
                float* out, int64_t stride) {
  const Vec zero = _mm512_setzero_ps();
  const Tops tops = tops_of(entries, z, gap);
  const Sums sums = sums_of(entries, tops, z, gap);
  const __mmask16 empty = _mm512_cmp_ps_mask(tops.student, splat(kNegInf), _CMP_EQ_OQ);
  const Vec inverse = _mm512_mask_div_ps(zero, _knot_mask16(empty), splat(1.f), sums.e), centre = sums.gap * inverse;
  const Spread around = spread_of(entries, capped, centre, z, gap, slope);
  if (e_out) {
    // Below the limit 1 / largest may overflow.
    const __mmask16 some = _mm512_cmp_ps_mask(around.largest, splat(1e-30f), _CMP_GT_OQ);
    const Vec shrink = _mm512_mask_div_ps(zero, some, splat(1.f), around.largest);
    for (int64_t v = 0; v < entries; ++v) {
      store(e_out + v * kPanel, load(z + v * kPanel));
      if (gap) store(gap_out + v * kPanel, load(gap + v * kPanel) * shrink);
    }
  }
  const Vec fields[kFields] = {tops.student,
                               sums.e,
                               sums.offset * inverse,
                               centre,
                               around.rho * inverse,
                               gap ? tops.teacher : tops.student,
                               gap ? sums.teacher : sums.e,
                               around.largest,
                               around.square0,
                               around.square1,
                               around.square2};
  for (int field = 0; field < kFields; ++field) store(out + field * stride, fields[field]);
}

}  // namespace opsdl
