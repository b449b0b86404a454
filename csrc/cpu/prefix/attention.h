// What the two directions of attention share.
//
// The query heads that share a head of keys are folded into one list of queries: folded query q is head q % G of the group at
// position q / G. So one read of the keys serves the group, and under a causal mask a tile of queries still is a run of
// positions.
#pragma once

#include <ATen/Parallel.h>

#include "common/operands.h"

namespace opsdl {

constexpr float kLog2e = 1.44269504f;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// 2^x, relative error below 3e-7; 0 for -inf.
inline Vec exp2(Vec x) {
  x = _mm512_max_ps(splat(-200.f), x);  // the second operand is what a NaN leaves
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
  Vec y = splat(0.00132764703f);
  for (float c : {0.00967554133f, 0.0555071328f, 0.240221197f, 0.693146967f, 1.f}) y = _mm512_fmadd_ps(y, r, splat(c));
  return _mm512_scalef_ps(y, n);
}

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(n, 0, 16)) - 1); }

// store() in one instruction, where products in bf16 are.
inline void store_quick(float* x, Vec v) { store(x, v); }

OPSDL_AVX512_BF16 inline void store_quick(c10::BFloat16* x, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), (__m256i)_mm512_cvtneps_pbh(v));
}

template <class T>
Tensor scratch(at::IntArrayRef sizes) {
  return at::empty(sizes, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
}

struct Shape {
  int64_t B, Hq, Hkv, Lq, Lk, D;
  int64_t G, Q;     // query heads of a head of keys; folded queries of it
  int64_t columns;  // D in whole panels
  bool causal;
  float scale;

  Shape(const Tensor& query, const Tensor& key, float scale, bool causal)
      : B(query.size(0)),
        Hq(query.size(1)),
        Hkv(key.size(1)),
        Lq(query.size(2)),
        Lk(key.size(2)),
        D(query.size(3)),
        G(Hq / Hkv),
        Q(G * Lq),
        columns(panels(D) * kPanel),
        causal(causal),
        scale(scale) {}

  int64_t heads() const { return B * Hkv; }

  // How many of the keys a folded query sees.
  int64_t visible(int64_t query) const { return causal ? query / G + 1 : Lk; }
};

// A tensor [B, H, L, D] with any strides but the last: the D numbers of a position, by head of keys and folded query. Keys may
// lie in blocks of a pool [blocks, block_size, Hkv, D] instead.
template <class T>
struct Vectors {
  T* base;
  int64_t batch, head, position, Hkv, G;
  const int32_t* blocks = nullptr;
  int64_t block_size = 0, block = 0;

  Vectors(const Tensor& x, const Shape& shape, bool of_query)
      : base(static_cast<T*>(const_cast<void*>(x.const_data_ptr()))),
        batch(x.stride(0)),
        head(x.stride(1)),
        position(x.stride(2)),
        Hkv(shape.Hkv),
        G(of_query ? shape.G : 1) {}

  Vectors(const Tensor& pool, const Tensor& table)
      : base(static_cast<T*>(const_cast<void*>(pool.const_data_ptr()))),
        batch(0),
        head(pool.stride(2)),
        position(pool.stride(1)),
        Hkv(pool.size(2)),
        G(1),
        blocks(table.const_data_ptr<int32_t>()),
        block_size(pool.size(1)),
        block(pool.stride(0)) {}

  T* at(int64_t head_of_keys, int64_t i) const {
    if (blocks) return base + blocks[i / block_size] * block + i % block_size * position + head_of_keys * head;
    const int64_t b = head_of_keys / Hkv, h = head_of_keys % Hkv * G + i % G;
    return base + b * batch + h * head + i / G * position;
  }
};

// Vectors [first, first + count) one after the other, zeros up to `padded`.
template <class T>
void gather(const Vectors<T>& from, int64_t head, int64_t first, int64_t count, int64_t padded, int64_t D, T* out) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * D, from.at(head, first + i), D * sizeof(T));
  std::fill(out + count * D, out + padded * D, T(0.f));
}

// `count` vectors and the distance between them: where they lie, or, from blocks, copied.
template <class T>
std::pair<const T*, int64_t> run_of_vectors(const Vectors<T>& from, int64_t head, int64_t first, int64_t count, int64_t D,
                                            std::vector<T>& copy) {
  if (!from.blocks) return {from.at(head, first), from.position};
  copy.resize(count * D);
  gather(from, head, first, count, count, D, copy.data());
  return {copy.data(), D};
}

// Rows [count, D] -> packed panels of their transpose [D, count]. In the packed layout of bf16 a pair of numbers of a row
// stays together, so for either type these are transposes of 32-bit words.
template <class T>
void pack_transposed(const T* rows, int64_t ld, int64_t count, int64_t D, T* out) {
  const int64_t words = D * sizeof(T) / sizeof(float);
  float* to = reinterpret_cast<float*>(out);
  for (int64_t n = 0; n < count; n += kPanel, to += words * kPanel) {
    for (int64_t c = 0; c < kPanel; c += 16) {
      for (int64_t w = 0; w < words; w += 16) {
        Vec square[16];
        for (int64_t i = 0; i < 16; ++i) {
          const T* row = rows + (n + c + i) * ld + w * int64_t(sizeof(float) / sizeof(T));
          square[i] = n + c + i < count ? _mm512_maskz_loadu_ps(first_lanes(words - w), row) : _mm512_setzero_ps();
        }
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(16, words - w); ++i) store(to + (w + i) * kPanel + c, square[i]);
      }
    }
  }
}

// pack() of rows [count, D], zeros up to `padded` of them.
template <class T>
void pack_padded(const T* rows, int64_t ld, int64_t count, int64_t padded, int64_t D, std::vector<T>& copy, T* out) {
  if (count == padded) return pack(rows, ld, count, D, out);
  copy.assign(padded * D, T(0.f));
  for (int64_t n = 0; n < count; ++n) std::memcpy(copy.data() + n * D, rows + n * ld, D * sizeof(T));
  pack(copy.data(), D, padded, D, out);
}

// body(item) for every item, dealt out to the threads in turn: neighbours, which under a causal mask are of nearly equal
// size, go to different ones.
template <class Body>
void deal(int64_t items, const Body& body) {
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t item = thread; item < items; item += threads) body(item);
    }
    at::native::cpublas::brgemm_release();
  });
}

// Into how many parts, at most `most`, to divide each of `items` so that all threads have about the same to do.
inline int64_t parts(int64_t items, int64_t most) {
  const int64_t threads = at::get_num_threads();
  int64_t n = 1;
  while (n < most && items * n % threads && items * n < 4 * threads) ++n;
  return n;
}

inline Tensor vectors_contiguous(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

inline void check(const Tensor& query, const Tensor& key, const Tensor& value, bool causal) {
  const auto type = query.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "attend: query is ", type, "; expected float32 or bfloat16");
  TORCH_CHECK(type == at::kFloat || has_bf16(), "attend: query is bfloat16, for which this CPU has no products");
  TORCH_CHECK(query.dim() == 4 && query.numel() > 0, "attend: query is ", query.sizes(), "; expected non-empty [B, Hq, Lq, D]");
  const auto D = query.size(3);
  TORCH_CHECK(D % 2 == 0 && D <= 256, "attend: query has heads of ", D, " numbers; expected an even number up to 256");
  TORCH_CHECK(key.dim() == 4 && key.numel() > 0, "attend: key is ", key.sizes(), "; expected non-empty [B, Hkv, Lk, D]");
  TORCH_CHECK(key.size(0) == query.size(0) && key.size(3) == D && query.size(1) % key.size(1) == 0, "attend: key is ",
              key.sizes(), " and query ", query.sizes(), "; expected the same B and D, and Hq a multiple of Hkv");
  TORCH_CHECK(value.sizes() == key.sizes(), "attend: value is ", value.sizes(), " and key ", key.sizes());
  TORCH_CHECK(key.scalar_type() == type && value.scalar_type() == type, "attend: key is ", key.scalar_type(), " and value ",
              value.scalar_type(), "; expected ", type, " as query");
  TORCH_CHECK(!causal || query.size(2) == key.size(2), "attend: causal with query of ", query.size(2), " positions and key of ",
              key.size(2));
}

}  // namespace opsdl
