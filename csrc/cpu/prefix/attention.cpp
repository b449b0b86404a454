// Attention over one set of keys, as a part that can be merged with others: the forward.
//
// Keys and values are packed once for all queries that read them, or, where one tile of queries is all there is (decoding),
// just before their use. A tile of queries walks over its keys step by step with a running maximum and sum; where there are too
// few tiles for the threads, several walk over a share of the steps each and are merged. For a fixed number of threads the
// result is the same to the bit.
#include "prefix/attention.h"

#include <torch/library.h>

namespace opsdl {
namespace {

constexpr int64_t kTile = 96;   // queries that walk together: 16 times the 6 of the product's kernel
constexpr int64_t kStep = 256;  // keys of one step

// The scores of one query become exp2(score * factor - top), zeros from `visible` to `width`; the query's maximum, sum and
// output so far follow.
template <class T>
OPSDL_AVX512_BF16 void softmax(const float* scores, int64_t visible, int64_t width, float factor, T* probabilities, float& top,
                               float& sum, float* out, int64_t D) {
  const int64_t whole = visible / 16 * 16;
  const __mmask16 rest = first_lanes(visible - whole);
  Vec best = splat(kNegInf);
  for (int64_t c = 0; c < whole; c += 16) best = _mm512_max_ps(best, load(scores + c) * splat(factor));
  if (rest) best = _mm512_mask_max_ps(best, rest, best, load(scores + whole) * splat(factor));
  const float before = top;
  top = std::max(top, _mm512_reduce_max_ps(best));
  const float base = top == kNegInf ? 0.f : top;
  Vec total = _mm512_setzero_ps();
  for (int64_t c = 0; c < whole; c += 16) {
    const Vec e = exp2(_mm512_fmsub_ps(load(scores + c), splat(factor), splat(base)));
    total += e;
    store_quick(probabilities + c, e);
  }
  for (int64_t c = whole; c < width; c += 16) {
    const __mmask16 some = first_lanes(visible - c);
    const Vec e = _mm512_maskz_mov_ps(some, exp2(_mm512_fmsub_ps(load(scores + c), splat(factor), splat(base))));
    total += e;
    store_quick(probabilities + c, e);
  }
  if (sum != 0 && before != base) {
    const float shrink = std::exp2(before - base);
    sum *= shrink;
    for (int64_t d = 0; d < D; d += 16) store(out + d, load(out + d) * splat(shrink));
  }
  sum += _mm512_reduce_add_ps(total);
}

// A tile of queries and its attention to the keys so far.
template <class T>
class Walk {
 public:
  explicit Walk(const Shape& shape)
      : shape(shape),
        query(scratch<T>({kTile * shape.D})),
        probabilities(scratch<T>({kTile * kStep})),
        scores(scratch<float>({kTile * kStep})),
        out(scratch<float>({kTile * shape.columns})) {}

  void start(const Vectors<T>& queries, int64_t head, int64_t first_query) {
    first = first_query, count = std::min(kTile, shape.Q - first);
    gather(queries, head, first, count, count, shape.D, query.data_ptr<T>());
    std::fill_n(out.data_ptr<float>(), count * shape.columns, 0.f);
    std::fill_n(top, count, kNegInf), std::fill_n(sum, count, 0.f);
  }

  // The step of keys from `start`, packed: panels [D, 64] of the keys, then panels [depth, 64] of the values.
  void add(int64_t start, int64_t depth, const T* keys) {
    const int64_t seen = std::min(kStep, shape.visible(first + count - 1) - start), width = std::min(depth, round_up(seen, 16));
    const T *const q = query.const_data_ptr<T>(), *value = keys + panels(depth) * shape.D * kPanel;
    float *const s = scores.data_ptr<float>(), *const sums = out.data_ptr<float>();
    T* const e = probabilities.data_ptr<T>();
    for (int64_t k = 0; k < width; k += kPanel) {
      gemm(count, kPanel, shape.D, q, shape.D, keys + k * shape.D, s + k, kStep, false);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t visible = std::clamp<int64_t>(shape.visible(first + r) - start, 0, width);
      softmax(s + r * kStep, std::min(visible, shape.Lk - start), width, shape.scale * kLog2e, e + r * kStep, top[r], sum[r],
              sums + r * shape.columns, shape.D);
    }
    for (int64_t d = 0; d < shape.D; d += kPanel, value += depth * kPanel) {
      gemm(count, std::min(kPanel, shape.D - d), width, e, kStep, value, sums + d, shape.columns, true);
    }
  }

  void finish(const Vectors<float>& outs, const Vectors<float>& lses, int64_t head) const {
    for (int64_t r = 0; r < count; ++r) {
      const float inverse = sum[r] == 0 ? 0.f : 1 / sum[r], *const from = out.const_data_ptr<float>() + r * shape.columns;
      float* const to = outs.at(head, first + r);
      for (int64_t d = 0; d < shape.D; d += 16) {
        _mm512_mask_storeu_ps(to + d, first_lanes(shape.D - d), load(from + d) * splat(inverse));
      }
      *lses.at(head, first + r) = sum[r] == 0 ? kNegInf : (top[r] + std::log2(sum[r])) / kLog2e;
    }
  }

 private:
  const Shape& shape;
  Tensor query, probabilities, scores, out;
  int64_t first = 0, count = 0;
  float top[kTile], sum[kTile];
};

// One step of one head's keys and values, as Walk::add takes it; returns how many values, zeros among them.
template <class T>
int64_t pack_step(const Shape& shape, const Vectors<T>& key, const Vectors<T>& value, int64_t head, int64_t start,
                  std::vector<T>& copy, T* out) {
  const int64_t count = std::min(kStep, shape.Lk - start), depth = round_up(count, 16);
  std::vector<T> from_blocks;
  const auto [keys, key_distance] = run_of_vectors(key, head, start, count, shape.D, from_blocks);
  pack_transposed(keys, key_distance, count, shape.D, out);
  const auto [values, value_distance] = run_of_vectors(value, head, start, count, shape.D, from_blocks);
  pack_padded(values, value_distance, count, depth, shape.D, copy, out + panels(count) * shape.D * kPanel);
  return depth;
}

// out [parts, B, Hq, Lq, D] and lse [parts, B, Hq, Lq] -> those of all parts.
std::tuple<Tensor, Tensor> merge(const Tensor& outs, const Tensor& lses) {
  const Tensor lse = lses.logsumexp(0), weights = (lses - lse).nan_to_num_(0.).exp_();
  return {(weights.unsqueeze(-1) * outs).sum(0), lse};
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Shape& shape, const Tensor& query_BHLD, const Vectors<T>& key,
                                   const Vectors<T>& value) {
  const Vectors<T> query(query_BHLD, shape, true);
  const int64_t tiles = (shape.Q + kTile - 1) / kTile, steps = (shape.Lk + kStep - 1) / kStep,
                size = kStep * (shape.D + shape.columns);
  Tensor packed;
  if (tiles > 1) {
    packed = scratch<T>({shape.heads() * steps * size});
    deal(shape.heads() * steps, [&](int64_t item) {
      std::vector<T> copy;
      pack_step(shape, key, value, item / steps, item % steps * kStep, copy, packed.data_ptr<T>() + item * size);
    });
  }
  const int64_t shares = parts(shape.heads() * tiles, steps);
  const Tensor outs = scratch<float>({shares, shape.B, shape.Hq, shape.Lq, shape.D}),
               lses = scratch<float>({shares, shape.B, shape.Hq, shape.Lq});
  deal(shape.heads() * tiles * shares, [&](int64_t item) {
    const int64_t head = item / shares / tiles, tile = item / shares % tiles, share = item % shares;
    const Tensor own = packed.defined() ? Tensor() : scratch<T>({size});
    std::vector<T> copy;
    Walk<T> walk(shape);
    walk.start(query, head, tile * kTile);
    const int64_t end = shape.visible(std::min(shape.Q, (tile + 1) * kTile) - 1);
    for (int64_t start = share * kStep; start < end; start += shares * kStep) {
      int64_t depth = std::min(kStep, round_up(shape.Lk - start, 16));
      const T* step;
      if (packed.defined()) {
        step = packed.const_data_ptr<T>() + (head * steps + start / kStep) * size;
      } else {
        depth = pack_step(shape, key, value, head, start, copy, own.data_ptr<T>());
        step = own.const_data_ptr<T>();
      }
      walk.add(start, depth, step);
    }
    const Tensor out = outs[share], lse = lses[share].unsqueeze(-1);
    walk.finish(Vectors<float>(out, shape, true), Vectors<float>(lse, shape, true), head);
  });
  if (shares == 1) return {outs[0], lses[0]};
  return merge(outs, lses);
}

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value, double scale, bool causal) {
  check(query, key, value, causal);
  const Shape shape(query, key, scale, causal);
  const Tensor q = vectors_contiguous(query), k = vectors_contiguous(key), v = vectors_contiguous(value);
  const auto run = [&]<class T>(T) { return forward<T>(shape, q, Vectors<T>(k, shape, false), Vectors<T>(v, shape, false)); };
  return query.scalar_type() == at::kFloat ? run(0.f) : run(c10::BFloat16());
}

// One token of each of R responses [R, Hq, D], all over the same keys: [length, Hkv, D], or blocks of pools
// [blocks, block_size, Hkv, D].
std::tuple<Tensor, Tensor> prefix_decode(const Tensor& query_RHD, const Tensor& key, const Tensor& value,
                                         const Maybe& block_table, int64_t length, double scale) {
  TORCH_CHECK(query_RHD.dim() == 3, "prefix_decode: query is ", query_RHD.sizes(), "; expected [R, Hq, D]");
  TORCH_CHECK(key.dim() == (block_table ? 4 : 3) && length > 0, "prefix_decode: key is ", key.sizes(), ", length ", length,
              "; expected [L, Hkv, D], or with a block_table [blocks, block_size, Hkv, D], and a length above 0");
  const auto type = query_RHD.scalar_type();
  if (type == at::kHalf || (type == at::kBFloat16 && !has_bf16())) {
    return prefix_decode(query_RHD.to(at::kFloat), key.to(at::kFloat), value.to(at::kFloat), block_table, length, scale);
  }
  const auto by_head = [](const Tensor& x_LHD) { return vectors_contiguous(x_LHD).transpose(0, 1).unsqueeze(0); };
  const Tensor query = by_head(query_RHD);
  Tensor out, lse;
  if (!block_table) {
    TORCH_CHECK(length <= key.size(0), "prefix_decode: length is ", length, " and key ", key.sizes());
    std::tie(out, lse) = attend(query, by_head(key.narrow(0, 0, length)), by_head(value.narrow(0, 0, length)), scale, false);
  } else {
    const Tensor table = block_table->to(at::kInt).contiguous(), k = vectors_contiguous(key), v = vectors_contiguous(value);
    TORCH_CHECK(table.dim() == 1 && table.numel() * key.size(1) >= length, "prefix_decode: block_table is ", table.sizes(),
                " of blocks of ", key.size(1), " and length ", length);
    TORCH_CHECK(table.min().item<int>() >= 0 && table.max().item<int>() < key.size(0),
                "prefix_decode: block_table names blocks outside the pool of ", key.size(0));
    // What attend() would check of these keys, and their sizes, without a copy of them.
    const Tensor all_keys = key.flatten(0, 1).transpose(0, 1).unsqueeze(0);
    const Tensor all_values = value.flatten(0, 1).transpose(0, 1).unsqueeze(0);
    check(query, all_keys, all_values, false);
    Shape shape(query, all_keys, scale, false);
    shape.Lk = length;
    const auto run = [&]<class T>(T) { return forward<T>(shape, query, Vectors<T>(k, table), Vectors<T>(v, table)); };
    std::tie(out, lse) = type == at::kFloat ? run(0.f) : run(c10::BFloat16());
  }
  return {out[0].transpose(0, 1), lse[0].transpose(0, 1)};
}

}  // namespace

TORCH_LIBRARY_IMPL(opsdl, CPU, m) {
  m.impl("attend", attend);
  m.impl("prefix_decode", prefix_decode);
}

}  // namespace opsdl
