// Runs of bytes in and out of the blocks of a pool, 16 bytes a thread. An index outside the pool stops the kernel.
#pragma once

#include "platform.cuh"

namespace opsdl {

constexpr int kCopyThreads = 256;

struct alignas(16) Unit {
  uint32_t words[4];
};

// to[index(i)] = from[i], or to[i] = from[index(i)], for i < count runs of `units`.
template <bool kScatter, class Index>
__global__ void __launch_bounds__(kCopyThreads)
    copy_runs(Unit* to, const Unit* from, const Index* indices, long long total, int units, long long limit) {
  const long long step = static_cast<long long>(gridDim.x) * kCopyThreads;
  for (long long i = static_cast<long long>(blockIdx.x) * kCopyThreads + threadIdx.x; i < total; i += step) {
    const long long index = indices[i / units];
    if (index < 0 || index >= limit) __trap();
    const long long there = index * units + i % units;
    kScatter ? to[there] = from[i] : to[i] = from[there];
  }
}

// pool[targets[i]] = pool[sources[i]], for blocks of `units`.
template <class Index>
__global__ void __launch_bounds__(kCopyThreads)
    copy_within(Unit* pool, const Index* sources, const Index* targets, long long total, int units, long long limit) {
  const long long step = static_cast<long long>(gridDim.x) * kCopyThreads;
  for (long long i = static_cast<long long>(blockIdx.x) * kCopyThreads + threadIdx.x; i < total; i += step) {
    const long long from = sources[i / units], to = targets[i / units];
    if (from < 0 || from >= limit || to < 0 || to >= limit) __trap();
    pool[to * units + i % units] = pool[from * units + i % units];
  }
}

}  // namespace opsdl
