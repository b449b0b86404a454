// One token of each of R responses over the same keys: every key and value is read from memory once for up to 64 queries (32 in
// float32).
//
// The query heads that share a head of keys are, for all responses, the queries of one thread block, which walks over its share
// (split) of the keys in tiles, the next tile on its way while this one is used. Partial states of the splits are then merged
// (merge.cuh). Keys are [L, Hkv, D] with any strides of tokens and heads, or in the blocks of a pool
// [blocks, block_size, Hkv, D]; where it says block alone, that of a pool is meant.
#pragma once

#include "platform.cuh"

namespace opsdl {

struct DecodeArguments {
  const void *query, *key, *value;  // query [R, Hq, D], contiguous
  const int* table;                 // blocks, or null
  float *out, *lse;                 // [splits, R, Hq, D], [splits, R, Hq]
  int R, Hq, Hkv, D, length, block_size, blocks, keys_per_split;
  long long token_stride, head_stride, block_stride;
  float scale;
};

constexpr int kDecodeThreads = 128;

// Where token t of this thread block's head begins, in elements.
__device__ inline long long token_offset(const DecodeArguments& x, int t) {
  const long long head = blockIdx.y * x.head_stride;
  if (!x.table) return head + t * x.token_stride;
  const int block = x.table[t / x.block_size];
  if (block < 0 || block >= x.blocks) __trap();
  return head + block * x.block_stride + t % x.block_size * x.token_stride;
}

// Queries are numbered response by response, the heads of the group one after the other. Which row of `query` and `out`
// holds query q.
__device__ inline long long query_row(const DecodeArguments& x, int q) {
  const int group = x.Hq / x.Hkv;
  return static_cast<long long>(q / group) * x.Hq + blockIdx.y * group + q % group;
}

// A tile of keys and values into shared memory, rows `stride` elements apart; zeros outside [0, end) and beyond D.
template <int kKeys, int kWidth, class Element>
__device__ void fetch(const DecodeArguments& x, int start, int end, Element* keys, Element* values, int stride) {
  constexpr int kEach = 16 / sizeof(Element);
  for (int i = threadIdx.x; i < kKeys * (kWidth / kEach); i += kDecodeThreads) {
    const int row = i / (kWidth / kEach), column = i % (kWidth / kEach) * kEach;
    const bool inside = start + row < end && column < x.D;
    const long long from = inside ? token_offset(x, start + row) + column : 0;
    copy_16(keys + row * stride + column, static_cast<const Element*>(x.key) + from, inside);
    copy_16(values + row * stride + column, static_cast<const Element*>(x.value) + from, inside);
  }
  commit_copies();
}

// ---- bf16 and fp16: tensor cores, 16 queries a warp, D <= kWidth in {64, 128}

template <int kWidth>
struct HalfTile {
  static constexpr int kKeys = 64, kQueries = 64, kStride = kWidth + 8;  // 8 more: no two rows of a matrix in one bank
  uint16_t keys[2][kKeys * kStride], values[2][kKeys * kStride];
};

// The state of a warp's queries: lane l has rows l / 4 and l / 4 + 8, of `out` columns 8 i + 2 (l % 4) and the next.
template <int kWidth>
struct HalfState {
  float out[kWidth / 8][4], top[2], sum[2];
};

template <class T, int kWidth>
__device__ void attend_tile(const DecodeArguments& x, const HalfTile<kWidth>& tile, int stage, int visible,
                            const uint32_t (&query)[kWidth / 16][4], HalfState<kWidth>& state) {
  using Tile = HalfTile<kWidth>;
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
  float scores[Tile::kKeys / 8][4] = {};
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, &tile.keys[stage][(n * 16 + matrix / 2 * 8 + row) * Tile::kStride + k * 16 + matrix % 2 * 8]);
      multiply(T(), scores[2 * n], query[k], b[0], b[1]);
      multiply(T(), scores[2 * n + 1], query[k], b[2], b[3]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // rows l / 4, then l / 4 + 8
    float best = -INFINITY;
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& s = scores[n][2 * half + i];
        s = n * 8 + lane % 4 * 2 + i < visible ? s * (x.scale * kLog2e) : -INFINITY;
        best = fmaxf(best, s);
      }
    }
    best = fmaxf(best, __shfl_xor_sync(kWarp, best, 1));
    best = fmaxf(best, __shfl_xor_sync(kWarp, best, 2));
    const float top = fmaxf(state.top[half], best);  // finite: a tile has a visible key
    const float shrink = exp2f(state.top[half] - top);
    state.top[half] = top;
    state.sum[half] *= shrink;
#pragma unroll
    for (int n = 0; n < Tile::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& s = scores[n][2 * half + i];
        s = exp2f(s - top);
        state.sum[half] += s;
      }
    }
#pragma unroll
    for (int d = 0; d < kWidth / 8; ++d) state.out[d][2 * half] *= shrink, state.out[d][2 * half + 1] *= shrink;
  }
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k) {
    const float (&s)[4] = scores[2 * k], (&t)[4] = scores[2 * k + 1];
    const uint32_t a[4] = {pair(T(), s[0], s[1]), pair(T(), s[2], s[3]), pair(T(), t[0], t[1]), pair(T(), t[2], t[3])};
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d) {
      uint32_t b[4];
      load_transposed(b, &tile.values[stage][(k * 16 + matrix % 2 * 8 + row) * Tile::kStride + d * 16 + matrix / 2 * 8]);
      multiply(T(), state.out[2 * d], a, b[0], b[1]);
      multiply(T(), state.out[2 * d + 1], a, b[2], b[3]);
    }
  }
}

template <int kWidth>
__device__ void store_state(const DecodeArguments& x, int first_query, HalfState<kWidth>& state) {
  const int lane = threadIdx.x % 32, queries = x.R * (x.Hq / x.Hkv);
  const long long part = static_cast<long long>(blockIdx.x) * x.R * x.Hq;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = state.sum[half];
    sum += __shfl_xor_sync(kWarp, sum, 1);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    const int q = first_query + lane / 4 + 8 * half;
    if (q >= queries) continue;
    const long long at = part + query_row(x, q);
    const float inverse = 1.f / sum;
#pragma unroll
    for (int d = 0; d < kWidth / 8; ++d) {
      const int column = d * 8 + lane % 4 * 2;
      if (column >= x.D) continue;
      x.out[at * x.D + column] = state.out[d][2 * half] * inverse;
      x.out[at * x.D + column + 1] = state.out[d][2 * half + 1] * inverse;
    }
    if (lane % 4 == 0) x.lse[at] = (state.top[half] + log2f(sum)) * kLn2;
  }
}

// Grid (splits, Hkv, tiles of 64 queries); dynamic shared memory sizeof(HalfTile<kWidth>). Every split has a key.
template <class T, int kWidth>
__global__ void __launch_bounds__(kDecodeThreads, 2) decode_half(DecodeArguments x) {
  OPSDL_SHARED(memory);
  using Tile = HalfTile<kWidth>;
  Tile& tile = *reinterpret_cast<Tile*>(memory);
  const int lane = threadIdx.x % 32, queries = x.R * (x.Hq / x.Hkv);
  const int first_query = blockIdx.z * Tile::kQueries + threadIdx.x / 32 * 16;
  const int begin = blockIdx.x * x.keys_per_split, end = min(x.length, begin + x.keys_per_split);

  uint32_t query[kWidth / 16][4];
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int q = first_query + lane / 4 + i % 2 * 8, column = k * 16 + lane % 4 * 2 + i / 2 * 8;
      const bool inside = q < queries && column < x.D;
      const uint16_t* from = static_cast<const uint16_t*>(x.query) + (inside ? query_row(x, q) * x.D + column : 0);
      query[k][i] = inside ? *reinterpret_cast<const uint32_t*>(from) : 0;
    }
  }
  HalfState<kWidth> state = {{}, {-INFINITY, -INFINITY}, {}};

  fetch<Tile::kKeys, kWidth>(x, begin, end, tile.keys[0], tile.values[0], Tile::kStride);
  int stage = 0;
  for (int start = begin; start < end; start += Tile::kKeys, stage ^= 1) {
    wait_for_copies();
    __syncthreads();  // this tile is here, and the other one is not read any more
    if (start + Tile::kKeys < end) {
      fetch<Tile::kKeys, kWidth>(x, start + Tile::kKeys, end, tile.keys[stage ^ 1], tile.values[stage ^ 1], Tile::kStride);
    }
    if (first_query < queries) attend_tile<T, kWidth>(x, tile, stage, end - start, query, state);
  }
  if (first_query < queries) store_state<kWidth>(x, first_query, state);
}

// ---- float32: a key a lane, a query a warp at a time

template <int kWidth>
struct FloatTile {
  static constexpr int kKeys = 32, kQueries = 32, kStride = kWidth + 4;
  float keys[kKeys * kStride], values[kKeys * kStride], query[kQueries * kWidth];
};

// Grid (splits, Hkv, tiles of 32 queries); dynamic shared memory sizeof(FloatTile<kWidth>).
template <int kWidth>
__global__ void __launch_bounds__(kDecodeThreads) decode_float(DecodeArguments x) {
  OPSDL_SHARED(memory);
  using Tile = FloatTile<kWidth>;
  Tile& tile = *reinterpret_cast<Tile*>(memory);
  constexpr int kWarps = kDecodeThreads / 32, kEach = Tile::kQueries / kWarps, kPart = kWidth / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, queries = x.R * (x.Hq / x.Hkv);
  const int first_query = blockIdx.z * Tile::kQueries;
  const int begin = blockIdx.x * x.keys_per_split, end = min(x.length, begin + x.keys_per_split);

  for (int i = threadIdx.x; i < Tile::kQueries * kWidth; i += kDecodeThreads) {
    const int q = first_query + i / kWidth, column = i % kWidth;
    const bool inside = q < queries && column < x.D;
    tile.query[i] = inside ? static_cast<const float*>(x.query)[query_row(x, q) * x.D + column] : 0.f;
  }
  float out[kEach][kPart] = {}, top[kEach], sum[kEach] = {};
  for (int j = 0; j < kEach; ++j) top[j] = -INFINITY;

  for (int start = begin; start < end; start += Tile::kKeys) {
    __syncthreads();  // the tile before is not read any more
    fetch<Tile::kKeys, kWidth>(x, start, end, tile.keys, tile.values, Tile::kStride);
    wait_for_copies();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      float score = 0.f;
#pragma unroll 8
      for (int d = 0; d < kWidth; d += 4) {
        const float* const q = &tile.query[(warp + kWarps * j) * kWidth + d];
        const float* const k = &tile.keys[lane * Tile::kStride + d];
        score += q[0] * k[0] + q[1] * k[1] + q[2] * k[2] + q[3] * k[3];
      }
      score = start + lane < end ? score * (x.scale * kLog2e) : -INFINITY;
      float best = score;
      for (int apart = 16; apart; apart /= 2) best = fmaxf(best, __shfl_xor_sync(kWarp, best, apart));
      best = fmaxf(best, top[j]);
      const float shrink = exp2f(top[j] - best), p = exp2f(score - best);
      top[j] = best;
      sum[j] = sum[j] * shrink + p;
#pragma unroll
      for (int i = 0; i < kPart; ++i) out[j][i] *= shrink;
      for (int k = 0; k < Tile::kKeys; ++k) {
        const float of_key = __shfl_sync(kWarp, p, k);
#pragma unroll
        for (int i = 0; i < kPart; ++i) out[j][i] += of_key * tile.values[k * Tile::kStride + i * 32 + lane];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    float total = sum[j];
    for (int apart = 16; apart; apart /= 2) total += __shfl_xor_sync(kWarp, total, apart);
    const int q = first_query + warp + kWarps * j;
    if (q >= queries) continue;
    const long long at = static_cast<long long>(blockIdx.x) * x.R * x.Hq + query_row(x, q);
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      if (i * 32 + lane < x.D) x.out[at * x.D + i * 32 + lane] = out[j][i] / total;
    }
    if (lane == 0) x.lse[at] = (top[j] + log2f(total)) * kLn2;
  }
}

}  // namespace opsdl
