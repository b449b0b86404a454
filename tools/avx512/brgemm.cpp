// torch's product of float32 matrices with a packed B, which torch has for AVX-512 only. -Bsymbolic-functions makes the library
// that this is linked into call it instead of torch's.
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>

namespace at::native::cpublas {

void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, const bool add_C, const float* A,
            const float* B, float* C, bool) {
  for (int64_t m = 0; m < M; ++m) {
    float* const sum = C + m * ld_c;
    if (!add_C) std::fill_n(sum, N, 0.f);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < N; ++n) sum[n] = std::fma(A[m * ld_a + k], B[k * ld_b + n], sum[n]);
    }
  }
}

}  // namespace at::native::cpublas
