// A fiber for every CUDA thread of a block, and the switch between them and the scheduler.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <vector>

#include "keywords.h"
#include "sanitizers.h"

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

namespace shim {

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
  fiber.thread_index = dim3(linear_index % shape.x, linear_index / shape.x % shape.y, linear_index / (shape.x * shape.y));
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
  void* tag =
      barrier == State::kBlockBarrier ? &g_block->block_barrier_tag : &g_block->warp_barrier_tag[fiber->linear_index / kWarp];
  tsan::release(tag);
  switch_to_scheduler();
  tsan::acquire(tag);
  tsan::ignore_end();
}

}  // namespace shim
