// Runs the blocks of a grid one after another, and the fibers of a block in turns, until barriers let them go on.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <list>
#include <stdexcept>

#include "fibers.h"

namespace shim {

inline uint64_t g_random_state = 88172645463325252ull;
inline uint32_t random_number() {
  g_random_state ^= g_random_state << 13;
  g_random_state ^= g_random_state >> 7;
  g_random_state ^= g_random_state << 17;
  return (uint32_t)g_random_state;
}

inline int count(State state) {
  int n = 0;
  for (const Fiber& fiber : g_block->fibers) n += fiber.state == state;
  return n;
}

inline bool release_complete_warps() {
  Block& b = *g_block;
  bool released = false;
  for (int first = 0; first < b.size; first += kWarp) {
    const int end = std::min(first + kWarp, b.size);
    unsigned arrived = 0, expected = 0;
    for (int i = first; i < end; ++i) {
      if (b.fibers[i].state != State::kWarpBarrier) continue;
      arrived |= 1u << (i - first);
      expected |= b.fibers[i].warp_mask;
    }
    if (end - first < kWarp) expected &= (1u << (end - first)) - 1;
    if (!arrived || (expected & ~arrived)) continue;
    for (int i = first; i < end; ++i) {
      if (b.fibers[i].state == State::kWarpBarrier) b.fibers[i].state = State::kRunning;
    }
    released = true;
  }
  return released;
}

inline bool release_complete_block() {
  const int waiting = count(State::kBlockBarrier), done = count(State::kDone);
  if (!waiting || waiting + done != g_block->size) return false;
  if (done) throw std::runtime_error("__syncthreads: some threads have exited (barrier divergence)");
  for (Fiber& fiber : g_block->fibers) fiber.state = State::kRunning;
  return true;
}

inline void run_block(std::function<void()>& kernel, bool random_order) {
  Block& b = *g_block;
  b.kernel = &kernel;
  asan::unpoison(b.fibers[0].stack, kStackSize * b.size);
  std::vector<int> order(b.size);
  for (int i = 0; i < b.size; ++i) {
    order[i] = i;
    prepare_fiber(b.fibers[i], i);
  }
  for (;;) {
    if (random_order) {
      for (int i = b.size - 1; i > 0; --i) std::swap(order[i], order[random_number() % (i + 1)]);
    }
    bool progress = false;
    for (int i : order) {
      if (b.fibers[i].state != State::kRunning) continue;
      switch_to_fiber(&b.fibers[i]);
      progress = true;
      if (b.error) std::rethrow_exception(b.error);
    }
    if (count(State::kDone) == b.size) return;
    progress |= release_complete_warps();
    progress |= release_complete_block();
    if (!progress) {
      throw std::runtime_error("deadlock: threads wait at different barriers / a shuffle lane is missing");
    }
  }
}

// Run kernel (a callable without arguments) for every thread of the grid. seed != 0 randomises the thread order.
template <class Kernel>
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, Kernel kernel, int seed = 0) {
  static auto& blocks = *new std::list<Block>;  // kept: the thread sanitizer would see the next launch reuse the memory
  Block& b = blocks.emplace_back();
  tsan::ignore_begin();  // the fibers of an earlier launch read g_block
  g_block = &b;
  tsan::ignore_end();
  b.grid = grid;
  b.block = block;
  b.size = block.x * block.y * block.z;
  b.fibers.resize(b.size);
  b.exchange_slot.resize(b.size);
  const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* stacks = (char*)mmap(nullptr, kStackSize * b.size, protection, flags, -1, 0);
  for (int i = 0; i < b.size; ++i) b.fibers[i].stack = stacks + kStackSize * i;
  b.scheduler_tsan_fiber = tsan::current_fiber();
  g_random_state ^= seed * 0x9E3779B97F4A7C15ull;
  std::function<void()> function = kernel;
  const auto clean_up = [&] {
    munmap(stacks, kStackSize * b.size);
    tsan::ignore_begin();  // every fiber read g_block
    g_block = nullptr;
    tsan::ignore_end();
  };
  try {
    for (b.index.z = 0; b.index.z < grid.z; ++b.index.z) {
      for (b.index.y = 0; b.index.y < grid.y; ++b.index.y) {
        for (b.index.x = 0; b.index.x < grid.x; ++b.index.x) {
          b.dynamic_shared.assign(dynamic_shared_bytes, (char)0xFF);  // NaN as float, half or bf16
          tsan::release(&b.launch_tag);
          tsan::ignore_begin();
          run_block(function, seed != 0);
          tsan::ignore_end();
          tsan::acquire(&b.done_tag);
        }
      }
    }
  } catch (...) {
    clean_up();
    throw;
  }
  for (Fiber& fiber : b.fibers) tsan::destroy_fiber(fiber.tsan_fiber);
  clean_up();
}

}  // namespace shim
