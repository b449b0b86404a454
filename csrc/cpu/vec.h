// The few vector functions of the loss, 16 floats at a time.
#pragma once

#include <immintrin.h>

namespace opsdl {

using Vec = __m512;

inline Vec splat(float x) { return _mm512_set1_ps(x); }

inline constexpr float kNegInf = -__builtin_inff();

// exp(x), relative error below 2e-7; 0 for -inf, inf for large x.
inline Vec exp(Vec x) {
  x = _mm512_max_ps(splat(-128.f), _mm512_min_ps(splat(128.f), x));  // the second operand is what a NaN leaves
  const Vec n = _mm512_roundscale_ps(x * splat(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = _mm512_fnmadd_ps(n, splat(-2.12194440e-4f), _mm512_fnmadd_ps(n, splat(0.693359375f), x));
  Vec y = splat(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) y = _mm512_fmadd_ps(y, r, splat(c));
  return _mm512_scalef_ps(y, n);
}

// rho(x) = exp(x) - 1 - x with full relative accuracy.
inline Vec expm1_residual(Vec x) {
  Vec series = splat(1.f);
  for (float n : {10.f, 9.f, 8.f, 7.f, 6.f, 5.f, 4.f, 3.f}) series = _mm512_fmadd_ps(x * splat(1.f / n), series, splat(1.f));
  const Vec near = x * x * splat(0.5f) * series;
  const Vec far = exp(x) - splat(1.f) - x;
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x), splat(0.5f), _CMP_LT_OQ), far, near);
}

// tanh(x) with full relative accuracy.
inline Vec tanh(Vec x) {
  // tanh x = d / (d + 2), d = exp(2x) - 1 = rho(2x) + 2x
  const Vec limit = _mm512_max_ps(splat(-20.f), _mm512_min_ps(splat(20.f), x));
  const Vec d = expm1_residual(limit + limit) + limit + limit;
  return d / (d + splat(2.f));
}

}  // namespace opsdl
