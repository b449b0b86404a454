// Partial attention states [S, rows, D] and [S, rows] merged into one: a warp a row. An infinite lse is that of a part without
// keys (some flash kernels write +inf), whatever its out holds.
#pragma once

#include "platform.cuh"

namespace opsdl {

constexpr int kMergeThreads = 128;

__device__ inline float part_weight(float lse, float of_all) { return isinf(lse) ? 0.f : exp2f((lse - of_all) * kLog2e); }

__device__ inline long long row_of_warp() {
  return static_cast<long long>(blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
}

__global__ void __launch_bounds__(kMergeThreads)
    merge_states(const float* __restrict__ outs, const float* __restrict__ lses, float* __restrict__ out,
                 float* __restrict__ lse, int S, long long rows, int D) {
  const long long row = row_of_warp();
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float top = -INFINITY, sum = 0.f;
  for (int s = lane; s < S; s += 32) {
    const float l = lses[s * rows + row];
    if (!isinf(l)) top = fmaxf(top, l);
  }
  for (int apart = 16; apart; apart /= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, apart));
  for (int s = lane; s < S; s += 32) sum += part_weight(lses[s * rows + row], top);
  for (int apart = 16; apart; apart /= 2) sum += __shfl_xor_sync(kWarp, sum, apart);
  const float whole = sum > 0.f ? top + log2f(sum) * kLn2 : -INFINITY;
  if (lane == 0) lse[row] = whole;
  for (int d = lane; d < D; d += 32) {
    float x = 0.f;
    for (int s = 0; s < S; ++s) {
      const float w = part_weight(lses[s * rows + row], whole);
      if (w > 0.f) x += w * outs[(s * rows + row) * D + d];
    }
    out[row * D + d] = x;
  }
}

}  // namespace opsdl
