// The AVX-512 intrinsics that csrc/cpu uses, lane by lane, for a CPU that has AVX2. g++ >= 11, forced in front of each source:
//
//   g++ -std=c++20 -O2 -march=x86-64-v3 -Wno-psabi -DOPSDL_EMULATED -include tools/avx512/intrinsics.h -c source.cpp
//
// They have the real names, in the namespace of the sources, where a call finds them before the compiler's own. One that is
// missing here finds those instead, and does not compile: g++ refuses to inline it without AVX-512.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace opsdl {
namespace emulated {

using Words = uint32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(64)));
using HalfShorts = uint16_t __attribute__((vector_size(32)));

// The vector whose lane i is lane(i).
template <class Vector = __m512, class Lane>
Vector each(const Lane& lane) {
  constexpr int kLanes = sizeof(Vector) / sizeof(Vector{}[0]);
  Vector out;
  for (int i = 0; i < kLanes; ++i) out[i] = lane(i);
  return out;
}

// Lane `if_set` where the mask has a one, else `if_clear`.
inline __m512 choose(__mmask16 mask, __m512 if_set, __m512 if_clear) {
  return each([&](int i) { return mask >> i & 1 ? if_set[i] : if_clear[i]; });
}

// The lanes of a mask where holds(i).
template <class Holds>
__mmask16 lanes_where(const Holds& holds) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= unsigned{holds(i)} << i;
  return static_cast<__mmask16>(mask);
}

// The instructions for bf16 take denormal numbers as zeros, whatever MXCSR says.
inline uint32_t without_denormal(uint32_t bits) { return bits & 0x7f800000 ? bits : bits & 0x80000000; }

inline float high_bf16(uint32_t pair) { return std::bit_cast<float>(without_denormal(pair & 0xffff0000)); }

inline float low_bf16(uint32_t pair) { return high_bf16(pair << 16); }

}  // namespace emulated

// ---- constants, memory ----

inline __m512 _mm512_set1_ps(float x) {
  return emulated::each([&](int) { return x; });
}

inline __m512 _mm512_setzero_ps() { return __m512{}; }

inline __m512i _mm512_set1_epi32(int x) {
  return (__m512i)emulated::each<emulated::Words>([&](int) { return static_cast<uint32_t>(x); });
}

inline __m512i _mm512_set_epi64(int64_t x7, int64_t x6, int64_t x5, int64_t x4, int64_t x3, int64_t x2, int64_t x1,
                                int64_t x0) {
  return __m512i{x0, x1, x2, x3, x4, x5, x6, x7};
}

inline __m512 _mm512_loadu_ps(const void* from) {
  __m512 out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

inline __m512i _mm512_loadu_si512(const void* from) { return (__m512i)_mm512_loadu_ps(from); }

inline void _mm512_storeu_ps(void* to, __m512 x) { std::memcpy(to, &x, sizeof x); }

inline void _mm512_storeu_si512(void* to, __m512i x) { std::memcpy(to, &x, sizeof x); }

// Memory behind a zero of the mask is not touched, as by the instructions.
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  return emulated::each([&](int i) {
    float x = 0.f;
    if (mask >> i & 1) std::memcpy(&x, static_cast<const char*>(from) + i * sizeof x, sizeof x);
    return x;
  });
}

inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
  return (__m512i)emulated::each<emulated::Shorts>([&](int i) {
    uint16_t x = 0;
    if (mask >> i & 1) std::memcpy(&x, static_cast<const char*>(from) + i * sizeof x, sizeof x);
    return x;
  });
}

inline void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 x) {
  for (int i = 0; i < 16; ++i) {
    const float lane = x[i];
    if (mask >> i & 1) std::memcpy(static_cast<char*>(to) + i * sizeof lane, &lane, sizeof lane);
  }
}

// ---- arithmetic ----

inline __m512 _mm512_abs_ps(__m512 a) {
  return emulated::each([&](int i) { return std::fabs(a[i]); });
}

// The second operand where one is NaN, or both are zeros.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return emulated::each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}

inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return emulated::each([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}

inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emulated::each([&](int i) { return std::fma(a[i], b[i], c[i]); });
}

inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, -c); }

inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(-a, b, c); }

// To nearest even: the rounding that csrc/cpu asks for is the one in MXCSR.
inline __m512 _mm512_roundscale_ps(__m512 a, int how) {
  if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  return emulated::each([&](int i) { return std::nearbyint(a[i]); });
}

// a 2^floor(b). Beyond 600 in magnitude the power is 0 or infinite for every a.
inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  return emulated::each([&](int i) {
    if (std::isnan(b[i])) return b[i];
    return std::ldexp(a[i], static_cast<int>(std::floor(std::fmin(600.f, std::fmax(-600.f, b[i])))));
  });
}

// In the order of the compiler's own: halves, quarters, ..., so that the rounding is the same.
inline float _mm512_reduce_add_ps(__m512 x) {
  float sum[16];
  _mm512_storeu_ps(sum, x);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] = sum[i + width] + sum[i];
  }
  return sum[0];
}

inline float _mm512_reduce_max_ps(__m512 x) {
  float top[16];
  _mm512_storeu_ps(top, x);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) top[i] = top[i] > top[i + width] ? top[i] : top[i + width];
  }
  return top[0];
}

// ---- masks ----

inline __mmask16 _knot_mask16(__mmask16 mask) { return static_cast<__mmask16>(~mask); }

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int comparison) {
  return emulated::lanes_where([&](int i) {
    switch (comparison) {
      case _CMP_EQ_OQ:
        return a[i] == b[i];
      case _CMP_NEQ_OQ:
        return a[i] < b[i] || a[i] > b[i];
      case _CMP_NEQ_UQ:
        return a[i] != b[i];
      case _CMP_LT_OQ:
        return a[i] < b[i];
      case _CMP_GT_OQ:
        return a[i] > b[i];
      default:
        __builtin_trap();
    }
  });
}

inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) { return emulated::choose(mask, b, a); }

inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) { return emulated::choose(mask, a, __m512{}); }

inline __m512 _mm512_mask_add_ps(__m512 source, __mmask16 mask, __m512 a, __m512 b) {
  return emulated::choose(mask, a + b, source);
}

inline __m512 _mm512_mask_sub_ps(__m512 source, __mmask16 mask, __m512 a, __m512 b) {
  return emulated::choose(mask, a - b, source);
}

inline __m512 _mm512_mask_div_ps(__m512 source, __mmask16 mask, __m512 a, __m512 b) {
  return emulated::choose(mask, a / b, source);
}

inline __m512 _mm512_mask_max_ps(__m512 source, __mmask16 mask, __m512 a, __m512 b) {
  return emulated::choose(mask, _mm512_max_ps(a, b), source);
}

inline __m512 _mm512_maskz_compress_ps(__mmask16 mask, __m512 a) {
  __m512 out{};
  for (int i = 0, next = 0; i < 16; ++i) {
    if (mask >> i & 1) out[next++] = a[i];
  }
  return out;
}

// ---- bits and types ----

inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }

inline __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }

inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }

inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((emulated::Words)a + (emulated::Words)b); }

inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return (__m512i)((emulated::Words)a << n); }

inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) { return (__m512i)((emulated::Words)a >> n); }

inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return (__m256i) __builtin_convertvector((emulated::Words)a, emulated::HalfShorts);
}

inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return (__m512i) __builtin_convertvector((emulated::HalfShorts)a, emulated::Words);
}

inline __m512 _mm512_cvtph_ps(__m256i a) {
  return emulated::each([&](int i) { return _cvtsh_ss(((emulated::HalfShorts)a)[i]); });
}

inline __m256i _mm512_cvtps_ph(__m512 a, int how) {
  if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  return (__m256i)emulated::each<emulated::HalfShorts>(
      [&](int i) { return _cvtss_sh(a[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); });
}

inline __m256i _mm512_cvtneps_pbh(__m512 a) {  // to nearest even; NaN becomes a quiet one
  return (__m256i)emulated::each<emulated::HalfShorts>([&](int i) -> uint16_t {
    const uint32_t bits = emulated::without_denormal(((emulated::Words)a)[i]);
    if (std::isnan(a[i])) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  });
}

// A lane's two products are exact in float32, and each sum is rounded: the odd one first, as the manual has it.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  return emulated::each([&](int i) {
    const uint32_t x = ((emulated::Words)a)[i], y = ((emulated::Words)b)[i];
    const float odd = std::fma(emulated::high_bf16(x), emulated::high_bf16(y), sum[i]);
    return std::fma(emulated::low_bf16(x), emulated::low_bf16(y), odd);
  });
}

// ---- permutations; the first four work within each quarter of the vector ----

inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return emulated::each([&](int i) { return (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2]; });
}

inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return emulated::each([&](int i) { return (i % 2 ? b : a)[i / 4 * 4 + 2 + i % 4 / 2]; });
}

inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) {
  return (__m512i)emulated::each<emulated::Shorts>(
      [&](int i) { return ((emulated::Shorts)(i % 2 ? b : a))[i / 8 * 8 + i % 8 / 2]; });
}

inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
  return (__m512i)emulated::each<emulated::Shorts>(
      [&](int i) { return ((emulated::Shorts)(i % 2 ? b : a))[i / 8 * 8 + 4 + i % 8 / 2]; });
}

inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int choice) {
  return emulated::each([&](int i) { return (i % 4 < 2 ? a : b)[i / 4 * 4 + (choice >> 2 * (i % 4) & 3)]; });
}

inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int choice) {  // of whole quarters
  return emulated::each([&](int i) { return (i < 8 ? a : b)[4 * (choice >> 2 * (i / 4) & 3) + i % 4]; });
}

inline __m512i _mm512_permutex2var_epi64(__m512i a, __m512i index, __m512i b) {
  return emulated::each<__m512i>([&](int i) { return (index[i] & 8 ? b : a)[index[i] & 7]; });
}

}  // namespace opsdl
