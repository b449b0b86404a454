// Products of a row-major A with a packed B of at most 64 columns, float32 out: the loop under every product of the loss.
//
// float   through torch's brgemm (oneDNN micro-kernels).
// bf16    through torch's brgemm where the CPU has AMX; with AVX512_BF16 alone torch offers none, and the kernel below
//         keeps 6 x 64 float32 accumulators in registers. Both read B in the VNNI layout [K/2][64][2].
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace opsdl {

constexpr int64_t kPanel = 64;  // columns of a packed panel of B

inline int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

inline bool has_amx_bf16() {
  static const bool has = at::native::cpublas::could_pack(at::kBFloat16);
  return has;
}

// AVX512_BF16: what a function needs that uses it, and whether the CPU has it.
#ifndef OPSDL_EMULATED
#define OPSDL_AVX512_BF16 __attribute__((target("avx512bf16")))
inline bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }
#else  // in tools/avx512, which has functions in place of the instructions
#define OPSDL_AVX512_BF16
inline bool has_avx512_bf16() { return true; }
#endif

inline bool has_bf16() { return has_amx_bf16() || has_avx512_bf16(); }

// ---- packing: B [K, N] with row stride ld -> panels [K, 64] one after the other, zeros beyond N ----

inline void pack(const float* B, int64_t ld, int64_t K, int64_t N, float* out) {
  for (int64_t n = 0; n < N; n += kPanel) {
    const int64_t width = std::min(kPanel, N - n);
    for (int64_t k = 0; k < K; ++k, out += kPanel) {
      std::memcpy(out, B + k * ld + n, width * sizeof(float));
      std::fill(out + width, out + kPanel, 0.f);
    }
  }
}

// Pairs of rows are interleaved; K must be even.
inline void pack(const c10::BFloat16* B, int64_t ld, int64_t K, int64_t N, c10::BFloat16* out) {
  const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  for (int64_t n = 0; n < N; n += kPanel) {
    for (int64_t k = 0; k < K; k += 2, out += 2 * kPanel) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t left = std::clamp<int64_t>(N - n - 32 * half, 0, 32);
        const __mmask32 mask = left == 32 ? ~0u : (1u << left) - 1;
        const c10::BFloat16* source = B + k * ld + n + 32 * half;
        const __m512i even = _mm512_maskz_loadu_epi16(mask, source), odd = _mm512_maskz_loadu_epi16(mask, source + ld);
        const __m512i a = _mm512_unpacklo_epi16(even, odd), b = _mm512_unpackhi_epi16(even, odd);
        _mm512_storeu_si512(out + 64 * half, _mm512_permutex2var_epi64(a, low, b));
        _mm512_storeu_si512(out + 64 * half + 32, _mm512_permutex2var_epi64(a, high, b));
      }
    }
  }
}

// ---- C [M, N] (+)= A [M, K] B [K, N], N <= 64 ----

template <int kRows>
OPSDL_AVX512_BF16 inline void rows_bf16(int64_t K, int64_t N, const c10::BFloat16* A, int64_t lda, const c10::BFloat16* B,
                                        float* C, int64_t ldc, bool add) {
  __m512 sum[kRows][4];
  __mmask16 mask[4];
  for (int j = 0; j < 4; ++j) {
    const int64_t left = std::clamp<int64_t>(N - 16 * j, 0, 16);
    mask[j] = static_cast<__mmask16>((1u << left) - 1);
    for (int r = 0; r < kRows; ++r) {
      sum[r][j] = add ? _mm512_maskz_loadu_ps(mask[j], C + r * ldc + 16 * j) : _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < K; k += 2, B += 2 * kPanel) {
    __m512bh b[4];
    for (int j = 0; j < 4; ++j) b[j] = (__m512bh)_mm512_loadu_si512(B + 32 * j);
    for (int r = 0; r < kRows; ++r) {
      int pair;
      std::memcpy(&pair, A + r * lda + k, sizeof pair);
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], a, b[j]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 4; ++j) _mm512_mask_storeu_ps(C + r * ldc + 16 * j, mask[j], sum[r][j]);
  }
}

inline void gemm(int64_t M, int64_t N, int64_t K, const c10::BFloat16* A, int64_t lda, const c10::BFloat16* B, float* C,
                 int64_t ldc, bool add) {
  if (has_amx_bf16()) {
    at::native::cpublas::brgemm(M, N, K, lda, kPanel, ldc, add, A, B, C, /*is_vnni=*/true);
    return;
  }
  int64_t m = 0;
  for (; m + 6 <= M; m += 6) rows_bf16<6>(K, N, A + m * lda, lda, B, C + m * ldc, ldc, add);
  for (; m + 2 <= M; m += 2) rows_bf16<2>(K, N, A + m * lda, lda, B, C + m * ldc, ldc, add);
  if (m < M) rows_bf16<1>(K, N, A + m * lda, lda, B, C + m * ldc, ldc, add);
}

inline void gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, float* C, int64_t ldc,
                 bool add) {
  at::native::cpublas::brgemm(M, N, K, lda, kPanel, ldc, add, A, B, C, /*is_vnni=*/false);
}

}  // namespace opsdl
