// What the kernels need of the hardware: asynchronous copies, tensor cores, conversions. In PTX for nvcc; in C++ for the host
// shim of the tests (tools/cuda_shim.h), where the 32 lanes of a warp exchange their operands instead.
#pragma once

#include <cstdint>

namespace opsdl {

constexpr unsigned kWarp = 0xffffffffu;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

struct Bf16 {};
struct Fp16 {};

#ifdef __CUDACC__

#define OPSDL_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, or zeros; there after commit and wait.
__device__ inline void copy_16(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit numbers, whose rows start where lanes 0-7, 8-15, 16-23 and 24-31 say.
__device__ inline void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}
__device__ inline void load_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row)));
}

// c [16, 8] += a [16, 16] b [16, 8]
__device__ inline void multiply(Bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(Fp16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t pair(Bf16, float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
__device__ inline uint32_t pair(Fp16, float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

#else  // the host shim

#define OPSDL_SHARED(name) unsigned char* const name = reinterpret_cast<unsigned char*>(shim::dynamic_shared())

using std::isinf, std::min;
[[noreturn]] inline void __trap() { throw std::runtime_error("trap"); }

inline void copy_16(void* to, const void* from, bool inside) { inside ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); }
inline void commit_copies() {}
inline void wait_for_copies() {}

// What every lane of the warp gives, for every lane to read.
template <class T>
const T* exchange(const T& mine) {
  static thread_local T all[32][32];
  T* const of_warp = all[threadIdx.x / 32];
  __syncwarp();
  of_warp[threadIdx.x % 32] = mine;
  __syncwarp();
  return of_warp;
}

inline void load_matrices(uint32_t (&x)[4], const void* row) {
  const void* const* const rows = exchange(row);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) x[i] = static_cast<const uint32_t*>(rows[8 * i + lane / 4])[lane % 4];
}
inline void load_transposed(uint32_t (&x)[4], const void* row) {
  const void* const* const rows = exchange(row);
  const int lane = threadIdx.x % 32, first = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int r) -> uint32_t { return static_cast<const uint16_t*>(rows[8 * i + r])[lane / 4]; };
    x[i] = at(first) | at(first + 1) << 16;
  }
}

inline float number(Bf16, uint32_t bits) {
  const uint32_t wide = bits << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline float number(Fp16, uint32_t bits) {
  const uint16_t half = bits;
  _Float16 x;
  std::memcpy(&x, &half, 2);
  return x;
}
inline uint32_t bits(Bf16, float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  return (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
}
inline uint32_t bits(Fp16, float x) {
  const _Float16 half = x;
  uint16_t out;
  std::memcpy(&out, &half, 2);
  return out;
}
template <class T>
uint32_t pair(T t, float low, float high) {
  return bits(t, low) | bits(t, high) << 16;
}

template <class T>
void multiply(T t, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands* const all = exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int of_pair = k % 8 / 2, shift = k % 2 * 16;
      const uint32_t x = all[row % 8 * 4 + of_pair].a[row / 8 + k / 8 * 2] >> shift & 0xffff;
      const uint32_t y = all[column * 4 + of_pair].b[k / 8] >> shift & 0xffff;
      c[i] += number(t, x) * number(t, y);
    }
  }
}

#endif

}  // namespace opsdl
