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
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <list>
#include <stdexcept>
#include <vector>

// ---- CUDA keywords and types

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __constant__ static
#define __restrict__ __restrict

// ---- What the sanitizers must be told about fibers; empty without them

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(void const volatile*, size_t);
}
#endif

namespace shim {

namespace tsan {
#if defined(__SANITIZE_THREAD__)
constexpr unsigned kNoSync = 1;  // switching fibers must not order their memory accesses; barriers do
inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void create_fiber(void*& fiber) {
  if (fiber) __tsan_destroy_fiber(fiber);
  fiber = __tsan_create_fiber(0);
}
inline void destroy_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, kNoSync); }
inline void acquire(void* tag) { __tsan_acquire(tag); }
inline void release(void* tag) { __tsan_release(tag); }
inline void ignore_begin() {  // the shim's own bookkeeping is not the program under test
  AnnotateIgnoreReadsBegin("", 0);
  AnnotateIgnoreWritesBegin("", 0);
}
inline void ignore_end() {
  AnnotateIgnoreReadsEnd("", 0);
  AnnotateIgnoreWritesEnd("", 0);
}
#else
inline void* current_fiber() { return nullptr; }
inline void create_fiber(void*&) {}
inline void destroy_fiber(void*) {}
inline void switch_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}
inline void ignore_begin() {}
inline void ignore_end() {}
#endif
}  // namespace tsan

namespace asan {
#if defined(__SANITIZE_ADDRESS__)
inline void start_switch(void** fake_stack, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, size);
}
inline void finish_switch(void* fake_stack, const void** bottom, size_t* size) {
  __sanitizer_finish_switch_fiber(fake_stack, bottom, size);
}
inline void unpoison(void* memory, size_t size) { __asan_unpoison_memory_region(memory, size); }
#else
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
inline void unpoison(void*, size_t) {}
#endif
}  // namespace asan

// ---- Fibers

extern "C" void shim_switch(void** save_stack_pointer, void* load_stack_pointer);
#ifdef SHIM_IMPL
asm(R"(
.text
.globl shim_switch
.type shim_switch,@function
shim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#endif

constexpr size_t kStackSize = 256 << 10;
constexpr int kWarp = 32;

enum class State { kRunning, kBlockBarrier, kWarpBarrier, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* tsan_fiber = nullptr;
  State state = State::kRunning;
  dim3 thread_index;
  int linear_index = 0;
  unsigned warp_mask = 0;  // lanes expected at the warp barrier this fiber waits at
};

struct Block {
  dim3 grid, block, index;
  int size = 0;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  std::function<void()>* kernel = nullptr;
  std::vector<uint64_t> exchange_slot;  // one per thread, for shuffles and votes
  std::vector<char> dynamic_shared;
  std::exception_ptr error;
  void* scheduler_stack_pointer = nullptr;
  void* scheduler_tsan_fiber = nullptr;
  const void* scheduler_stack = nullptr;  // for asan
  size_t scheduler_stack_size = 0;
  char block_barrier_tag, warp_barrier_tag[64], launch_tag, done_tag;  // addresses for tsan
};

inline thread_local Block* g_block = nullptr;

inline void switch_to_fiber(Fiber* fiber) {
  g_block->current = fiber;
  tsan::switch_to(fiber->tsan_fiber);
  void* fake_stack = nullptr;
  asan::start_switch(&fake_stack, fiber->stack, kStackSize);
  shim_switch(&g_block->scheduler_stack_pointer, fiber->stack_pointer);
  asan::finish_switch(fake_stack, nullptr, nullptr);
}

inline void switch_to_scheduler() {
  Fiber* fiber = g_block->current;
  tsan::switch_to(g_block->scheduler_tsan_fiber);
  void* fake_stack = nullptr;
  const bool never_returns = fiber->state == State::kDone;
  asan::start_switch(never_returns ? nullptr : &fake_stack, g_block->scheduler_stack, g_block->scheduler_stack_size);
  shim_switch(&fiber->stack_pointer, g_block->scheduler_stack_pointer);
  asan::finish_switch(fake_stack, &g_block->scheduler_stack, &g_block->scheduler_stack_size);
}

inline void fiber_main() {
  asan::finish_switch(nullptr, &g_block->scheduler_stack, &g_block->scheduler_stack_size);
  tsan::acquire(&g_block->launch_tag);
  try {
    (*g_block->kernel)();
  } catch (...) {
    g_block->error = std::current_exception();
  }
  tsan::ignore_begin();
  tsan::release(&g_block->done_tag);
  g_block->current->state = State::kDone;
  tsan::ignore_end();
  switch_to_scheduler();
  abort();
}

inline void prepare_fiber(Fiber& fiber, int linear_index) {
  const dim3& shape = g_block->block;
  fiber.linear_index = linear_index;
  fiber.thread_index =
      dim3(linear_index % shape.x, linear_index / shape.x % shape.y, linear_index / (shape.x * shape.y));
  fiber.state = State::kRunning;
  void** top = (void**)(fiber.stack + kStackSize - 64);
  *--top = nullptr;
  *--top = (void*)&fiber_main;
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  fiber.stack_pointer = top;
  tsan::create_fiber(fiber.tsan_fiber);
}

inline void wait_at(State barrier, unsigned mask = ~0u) {
  tsan::ignore_begin();
  Fiber* fiber = g_block->current;
  fiber->state = barrier;
  fiber->warp_mask = mask;
  void* tag = barrier == State::kBlockBarrier ? &g_block->block_barrier_tag
                                              : &g_block->warp_barrier_tag[fiber->linear_index / kWarp];
  tsan::release(tag);
  switch_to_scheduler();
  tsan::acquire(tag);
  tsan::ignore_end();
}

// ---- Scheduler

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
