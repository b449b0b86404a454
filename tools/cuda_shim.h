// Run CUDA C++ device code on the CPU: every CUDA thread of a block is a fiber; __syncthreads, __syncwarp and the
// shuffles switch fibers. x86-64 Linux, g++ >= 11 or clang, C++20.
//
//   g++ -std=c++20 -O2 test.cpp                          with, in one .cpp: #define SHIM_IMPL, #include "cuda_shim.h",
//                                                        then the kernel's header and shim::launch(...)
//   ... -O1 -g -fsanitize=address,undefined              out-of-bounds and undefined behaviour, with file:line
//   ... -O1 -g -fsanitize=thread                         data races between barriers (100 times slower)
//
// Detects: barrier divergence, a missing lane in a shuffle, deadlock (all throw std::runtime_error), reads of
// uninitialised dynamic shared memory (poisoned with NaN), dependence on thread order (launch with seed != 0).
// Not modelled: tensor cores, asynchronous copies, warp lockstep, textures, global atomics across blocks (blocks run
// one after another), the approximation error of fast-math intrinsics. Static __shared__ memory is not poisoned.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "shim/scheduler.h"

namespace shim {

// The block's dynamic shared memory: in place of extern __shared__.
inline char* dynamic_shared() { return g_block->dynamic_shared.data(); }

inline int lane() { return g_block->current->linear_index % kWarp; }
inline int warp_start() { return g_block->current->linear_index / kWarp * kWarp; }

template <class T>
T exchange(unsigned mask, T value, int source_lane, bool valid) {
  static_assert(sizeof(T) <= 8);
  tsan::ignore_begin();
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  g_block->exchange_slot[g_block->current->linear_index] = bits;
  tsan::ignore_end();
  wait_at(State::kWarpBarrier, mask);
  T result = value;
  tsan::ignore_begin();
  if (valid) memcpy(&result, &g_block->exchange_slot[warp_start() + source_lane], sizeof result);
  tsan::ignore_end();
  wait_at(State::kWarpBarrier, mask);
  return result;
}

}  // namespace shim

// ---- CUDA built-ins

#define threadIdx (shim::g_block->current->thread_index)
#define blockIdx (shim::g_block->index)
#define blockDim (shim::g_block->block)
#define gridDim (shim::g_block->grid)
#define warpSize 32

inline void __syncthreads() { shim::wait_at(shim::State::kBlockBarrier); }
inline void __syncwarp(unsigned mask = ~0u) { shim::wait_at(shim::State::kWarpBarrier, mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return shim::exchange(mask, value, (shim::lane() & ~(width - 1)) + (source & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = shim::lane(), source = lane ^ lane_mask;
  return shim::exchange(mask, value, source, source / width == lane / width || source < lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = shim::lane();
  return shim::exchange(mask, value, lane + delta, (lane & (width - 1)) + delta < width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = shim::lane();
  return shim::exchange(mask, value, lane - delta, (lane & (width - 1)) >= delta);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = 0;
  shim::g_block->exchange_slot[shim::g_block->current->linear_index] = predicate != 0;
  shim::wait_at(shim::State::kWarpBarrier, mask);
  for (int i = 0; i < shim::kWarp; ++i) {
    const int thread = shim::warp_start() + i;
    if ((mask >> i & 1) && thread < shim::g_block->size) {
      votes |= (unsigned)shim::g_block->exchange_slot[thread] << i;
    }
  }
  shim::wait_at(shim::State::kWarpBarrier, mask);
  return votes;
}

template <class T>
T atomicAdd(T* address, T value) {
  T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
