// Attention over one set of keys, as a part that can be merged with others: the backward, given the merged out and lse.
//
// One pass with five products. A tile of keys K, V meets a tile of queries Q, G (the gradient for their output), all
// transposed, so that queries run along the vectors:
//
//   S^T = K Q^T,  P^T = exp(S^T - lse),  dP^T = V G^T,  dS^T = P^T (dP^T - delta)
//   dV += P^T G,  dK += dS^T Q,  dQ += dS K
//
// Queries are packed once; keys once too, as a tile of keys is met by one thread only, whose dK and dV nobody else adds to. dQ
// is summed per head of keys, and per share of its tiles of keys where there are fewer heads than threads. For a fixed number
// of threads the result is the same to the bit.
#include <torch/library.h>

#include "prefix/attention.h"

namespace opsdl {
namespace {

constexpr int64_t kKeys = 96;             // keys of a tile: 16 times the 6 of the product's kernel
constexpr int64_t kQueries = 2 * kPanel;  // queries of a tile

// The queries of all heads and the gradients for their outputs, as the products read them.
template <class T>
struct PackedQueries {
  const Shape& shape;
  bool key_value;
  int64_t tiles, size, width;
  Tensor transposed, plain, lse, delta;  // of query and gradient: [heads, tiles, 2, ...]

  PackedQueries(const Shape& shape, const Tensor& query_BHLD, const Tensor& grad_BHLD, const Tensor& lse_BHL,
                const Tensor& delta_BHL, bool key_value)
      : shape(shape),
        key_value(key_value),
        tiles((shape.Q + kQueries - 1) / kQueries),
        size(kQueries * shape.D),
        width(kQueries * shape.columns),
        transposed(scratch<T>({shape.heads() * tiles * 2 * size})),
        plain(scratch<T>({key_value ? shape.heads() * tiles * 2 * width : 0})),
        lse(scratch<float>({shape.heads() * tiles * kQueries})),
        delta(scratch<float>({shape.heads() * tiles * kQueries})) {
    const Vectors<T> sources[2] = {{query_BHLD, shape, true}, {grad_BHLD, shape, true}};
    const Tensor lse_BHL1 = lse_BHL.unsqueeze(-1), delta_BHL1 = delta_BHL.unsqueeze(-1);
    const Vectors<float> lses(lse_BHL1, shape, true), deltas(delta_BHL1, shape, true);
    deal(shape.heads() * tiles, [&](int64_t item) {
      const int64_t head = item / tiles, first = item % tiles * kQueries, count = queries_of(item % tiles);
      const Tensor gathered = scratch<T>({size});
      for (int64_t i = 0; i < 2; ++i) {
        T* const copy = gathered.data_ptr<T>();
        gather(sources[i], head, first, count, kQueries, shape.D, copy);
        pack_transposed(copy, shape.D, count, shape.D, transposed.data_ptr<T>() + (2 * item + i) * size);
        if (key_value) pack(copy, shape.D, round_up(count, 16), shape.D, plain.data_ptr<T>() + (2 * item + i) * width);
      }
      for (int64_t q = 0; q < kQueries; ++q) {
        // A query without keys has lse = -inf; with inf its probabilities are 0, as those of the ones that fill the tile.
        const float its = q < count ? *lses.at(head, first + q) : kNegInf;
        lse.data_ptr<float>()[item * kQueries + q] = its == kNegInf ? -kNegInf : its * kLog2e;
        delta.data_ptr<float>()[item * kQueries + q] = q < count ? *deltas.at(head, first + q) : 0.f;
      }
    });
  }

  int64_t queries_of(int64_t tile) const { return std::min(kQueries, shape.Q - tile * kQueries); }
};

// From the scores and dP [keys, 64] of a panel of queries: probabilities and gradients [keys, 128], where wanted, and the
// gradients' transpose [64, 96], with zeros from `keys` to a multiple of 16. The first key is seen from column `hidden` on,
// each further one from G columns further on.
template <class T>
OPSDL_AVX512_BF16 void to_gradients(int64_t keys, int64_t hidden, int64_t G, float factor, const float* lse, const float* delta,
                                    const float* scores, const float* grad_probabilities, T* probabilities, T* gradients,
                                    T* transposed) {
  for (int64_t c = 0; c < kPanel; c += 16) {
    const Vec lses = load(lse + c), deltas = load(delta + c);
    for (int64_t k = 0; k < keys; k += 16) {
      Vec square[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t at = (k + i) * kPanel + c, to = (k + i) * kQueries + c;
        Vec e = exp2(_mm512_fmsub_ps(load(scores + at), splat(factor), lses));
        e = _mm512_maskz_mov_ps(k + i < keys ? ~first_lanes(hidden + (k + i) * G - c) : 0, e);
        square[i] = e * (load(grad_probabilities + at) - deltas);
        if (k + i >= keys) square[i] = _mm512_setzero_ps();
        if (!probabilities) continue;
        store_quick(probabilities + to, e);
        store_quick(gradients + to, square[i]);
      }
      transpose(square);
      for (int64_t i = 0; i < 16; ++i) store_quick(transposed + (c + i) * kKeys + k, square[i]);
    }
  }
}

// What one thread holds while its tiles of keys meet the queries of a head.
template <class T>
class Meeting {
 public:
  explicit Meeting(const PackedQueries<T>& queries)
      : shape(queries.shape),
        queries(queries),
        packed_key(scratch<T>({kKeys * shape.columns})),
        probabilities(scratch<T>({kKeys * kQueries})),
        gradients(scratch<T>({kKeys * kQueries})),
        transposed(scratch<T>({kQueries * kKeys})),
        scores(scratch<float>({kKeys * kPanel})),
        grad_probabilities(scratch<float>({kKeys * kPanel})) {}

  // The keys from `start`; adds to grad_query [Q, D], and writes the tile's part of grad_key and grad_value unless null.
  void keys(const Vectors<T>& key, const Vectors<T>& value, int64_t head, int64_t start, float* grad_query, float* grad_key,
            float* grad_value) {
    count = std::min(kKeys, shape.Lk - start), depth = round_up(count, 16);
    pack_padded(key.at(head, start), key.position, count, depth, shape.D, copy, packed_key.data_ptr<T>());
    const int64_t first = shape.causal ? start * shape.G / kQueries : 0;
    for (int64_t tile = first; tile < queries.tiles; ++tile) {
      const int64_t at = head * queries.tiles + tile;
      to_operands(key, value, head, start, tile, grad_key != nullptr);
      if (grad_key) {
        const T* const plain = queries.plain.template const_data_ptr<T>() + 2 * at * queries.width;
        add(gradients, round_up(queries.queries_of(tile), 16), plain, tile > first, grad_key);
        add(probabilities, round_up(queries.queries_of(tile), 16), plain + queries.width, tile > first, grad_value);
      }
      const T* b = packed_key.const_data_ptr<T>();
      for (int64_t d = 0; d < shape.D; d += kPanel, b += depth * kPanel) {
        gemm(queries.queries_of(tile), std::min(kPanel, shape.D - d), depth, transposed.const_data_ptr<T>(), kKeys, b,
             grad_query + tile * kQueries * shape.D + d, shape.D, true);
      }
    }
    for (int64_t i = 0; grad_key && i < count * shape.D; ++i) grad_key[i] *= shape.scale;
  }

 private:
  void to_operands(const Vectors<T>& key, const Vectors<T>& value, int64_t head, int64_t start, int64_t tile, bool key_value) {
    const int64_t at = head * queries.tiles + tile;
    const T* const query = queries.transposed.template const_data_ptr<T>() + 2 * at * queries.size;
    float *const s = scores.data_ptr<float>(), *const dp = grad_probabilities.data_ptr<float>();
    for (int64_t c = 0; c < queries.queries_of(tile); c += kPanel) {
      gemm(count, kPanel, shape.D, key.at(head, start), key.position, query + c * shape.D, s, kPanel, false);
      gemm(count, kPanel, shape.D, value.at(head, start), value.position, query + queries.size + c * shape.D, dp, kPanel,
           false);
      const int64_t hidden = shape.causal ? start * shape.G - tile * kQueries - c : -kKeys * shape.G,
                    each = shape.causal ? shape.G : 0;
      to_gradients(count, hidden, each, shape.scale * kLog2e, queries.lse.template const_data_ptr<float>() + at * kQueries + c,
                   queries.delta.template const_data_ptr<float>() + at * kQueries + c, s, dp,
                   key_value ? probabilities.data_ptr<T>() + c : nullptr, gradients.data_ptr<T>() + c,
                   transposed.data_ptr<T>() + c * kKeys);
    }
  }

  // out [keys, D] (+)= A [keys, width] B
  void add(const Tensor& A, int64_t width, const T* B, bool more, float* out) const {
    for (int64_t d = 0; d < shape.D; d += kPanel, B += width * kPanel) {
      gemm(count, std::min(kPanel, shape.D - d), width, A.const_data_ptr<T>(), kQueries, B, out + d, shape.D, more);
    }
  }

  const Shape& shape;
  const PackedQueries<T>& queries;
  Tensor packed_key, probabilities, gradients, transposed, scores, grad_probabilities;
  std::vector<T> copy;
  int64_t count = 0, depth = 0;
};

// sums [shares, heads, Q padded, D] -> grad_query [B, Hq, Lq, D]
void add_up(const Shape& shape, const Tensor& sums, Tensor& grad_query) {
  const int64_t shares = sums.size(0), stride = sums.stride(0), padded = sums.size(2);
  const Vectors<float> out(grad_query, shape, true);
  deal(shape.heads() * shape.Lq, [&](int64_t item) {
    const int64_t head = item / shape.Lq, first = item % shape.Lq * shape.G;
    for (int64_t q = first; q < first + shape.G; ++q) {
      const float* const from = sums.const_data_ptr<float>() + (head * padded + q) * shape.D;
      float* const to = out.at(head, q);
      for (int64_t d = 0; d < shape.D; d += 16) {
        const __mmask16 some = first_lanes(shape.D - d);
        Vec sum = _mm512_maskz_loadu_ps(some, from + d);
        for (int64_t share = 1; share < shares; ++share) sum += _mm512_maskz_loadu_ps(some, from + share * stride + d);
        _mm512_mask_storeu_ps(to + d, some, sum * splat(shape.scale));
      }
    }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
Gradients backward(const Shape& shape, const PackedQueries<T>& queries, const Tensor& key_BHLD, const Tensor& value_BHLD) {
  const Vectors<T> key(key_BHLD, shape, false), value(value_BHLD, shape, false);
  const int64_t tiles = (shape.Lk + kKeys - 1) / kKeys, shares = parts(shape.heads(), tiles);
  const at::TensorOptions options(at::kFloat);
  const Tensor sums = at::zeros({shares, shape.heads(), queries.tiles * kQueries, shape.D}, options);
  const auto of_keys = [&] {
    return queries.key_value ? at::empty({shape.B, shape.Hkv, shape.Lk, shape.D}, options) : at::empty({0}, options);
  };
  Tensor grad_query = at::empty({shape.B, shape.Hq, shape.Lq, shape.D}, options), grad_key = of_keys(), grad_value = of_keys();
  deal(shape.heads() * shares, [&](int64_t item) {
    const int64_t head = item / shares, share = item % shares;
    float* const sum = sums.data_ptr<float>() + share * sums.stride(0) + head * sums.stride(1);
    Meeting<T> meeting(queries);
    for (int64_t start = share * kKeys; start < shape.Lk; start += shares * kKeys) {
      const int64_t at = (head * shape.Lk + start) * shape.D;
      meeting.keys(key, value, head, start, sum, queries.key_value ? grad_key.data_ptr<float>() + at : nullptr,
                   queries.key_value ? grad_value.data_ptr<float>() + at : nullptr);
    }
  });
  add_up(shape, sums, grad_query);
  return {grad_query, grad_key, grad_value};
}

Gradients attend_backward(const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
                          const Tensor& out, const Tensor& lse, double scale, bool causal, bool key_value) {
  check(query, key, value, causal);
  TORCH_CHECK(grad_out.sizes() == query.sizes(), "attend_backward: grad_out is ", grad_out.sizes(), " and query ",
              query.sizes());
  TORCH_CHECK(out.sizes() == query.sizes(), "attend_backward: out is ", out.sizes(), " and query ", query.sizes());
  TORCH_CHECK(lse.sizes() == query.sizes().slice(0, 3) && lse.scalar_type() == at::kFloat, "attend_backward: lse is ",
              lse.scalar_type(), " ", lse.sizes(), "; expected float32 ", query.sizes().slice(0, 3));
  const Shape shape(query, key, scale, causal);
  const Tensor delta = (grad_out * out.to(at::kFloat)).sum(-1, false, at::kFloat);
  const auto run = [&]<class T>(T) {
    const Tensor grad = vectors_contiguous(grad_out.to(query.scalar_type()));
    const PackedQueries<T> queries(shape, vectors_contiguous(query), grad, lse, delta, key_value);
    return backward<T>(shape, queries, vectors_contiguous(key), vectors_contiguous(value));
  };
  return query.scalar_type() == at::kFloat ? run(0.f) : run(c10::BFloat16());
}

}  // namespace

TORCH_LIBRARY_IMPL(opsdl, CPU, m) { m.impl("attend_backward", attend_backward); }

}  // namespace opsdl
