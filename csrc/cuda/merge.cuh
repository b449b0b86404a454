// Partial attention states [S, rows, D] and [S, rows] merged into one, and its backward: a warp a row. An infinite lse is that
// of a part without keys (some flash kernels write +inf), whatever its out holds.
#pragma once

#include "platform.cuh"

namespace opsdl {

constexpr int kMergeThreads = 128;

__device__ inline float part_weight(float lse, float of_all) { return isinf(lse) ? 0.f : exp2f((lse - of_all) * kLog2e); }

__device__ inline long long row_of_warp() {
  return static_cast<long long>(blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
}

__global__ void __launch_bounds__(kMergeThreads) merge_states(const float* __restrict__ outs, const float* __restrict__ lses,
                                                              float* __restrict__ out, float* __restrict__ lse, int S,
                                                              long long rows, int D) {
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

// grad_out [rows, D], grad_lse [rows] of the merged state -> those of the parts.
__global__ void __launch_bounds__(kMergeThreads)
    merge_states_backward(const float* __restrict__ grad_out, const float* __restrict__ grad_lse,
                          const float* __restrict__ outs, const float* __restrict__ lses, const float* __restrict__ out,
                          const float* __restrict__ lse, float* __restrict__ grad_outs, float* __restrict__ grad_lses, int S,
                          long long rows, int D) {
  const long long row = row_of_warp();
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  for (int s = 0; s < S; ++s) {
    const long long at = s * rows + row;
    const float w = part_weight(lses[at], lse[row]);
    float on_weight = 0.f;
    for (int d = lane; d < D; d += 32) {
      const float g = grad_out[row * D + d];
      grad_outs[at * D + d] = w * g;
      if (w > 0.f) on_weight += g * (outs[at * D + d] - out[row * D + d]);
    }
    for (int apart = 16; apart; apart /= 2) on_weight += __shfl_xor_sync(kWarp, on_weight, apart);
    if (lane == 0) grad_lses[at] = w > 0.f ? w * (grad_lse[row] + on_weight) : 0.f;
  }
}

}  // namespace opsdl
