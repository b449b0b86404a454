// The few vector functions that the losses and the shared prefix need, 16 floats at a time.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
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

// Sixteen numbers of memory as floats, and back.
inline Vec load(const c10::Half* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }

inline Vec load(const float* x) { return _mm512_loadu_ps(x); }

inline Vec load(const c10::BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store(float* x, Vec v) { _mm512_storeu_ps(x, v); }

inline void store(c10::Half* x, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline void store(c10::BFloat16* x, Vec v) {  // to nearest even; a quiet NaN stays one
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

// A 16 x 16 transpose of floats in registers.
inline void transpose(Vec (&rows)[16]) {
  Vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      rows[i + 2 * j + 1] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

}  // namespace opsdl
