// Attention over one set of keys, as a part that can be merged with others: the backward, given the merged out and lse.
//
// One pass with five products. A block of keys K, V meets a block of rows Q, G (the gradient for their output), all transposed,
// so that rows run along the vectors:
//
//   S^T = K Q^T,  P^T = exp(S^T - lse),  dP^T = V G^T,  dS^T = P^T (dP^T - delta)
//   dV += P^T G,  dK += dS^T Q,  dQ += dS K
//
// Rows are packed once; keys once too, as a block of keys is met by one thread only, whose dK and dV nobody else adds to. dQ is
// summed per head of keys, and per share of its blocks of keys where there are fewer heads than threads. For a fixed number of
// threads the result is the same to the bit.
#include <torch/library.h>

#include "prefix/attention.h"

namespace opsdl {
namespace {

constexpr int64_t kKeys = 96;   // keys of a block: 16 times the 6 of the product's kernel
constexpr int64_t kQueries = 2 * kPanel;  // rows of a block

// The rows of all heads, as the products read them.
template <class T>
struct PackedRows {
  const Problem& p;
  bool key_value;
  int64_t blocks, size, width;
  Tensor transposed, plain, lse, delta;  // of query and gradient: [heads, blocks, 2, ...]

  PackedRows(const Problem& p, const Tensor& query_BHLD, const Tensor& grad_BHLD, const Tensor& lse_BHL,
             const Tensor& delta_BHL, bool key_value)
      : p(p), key_value(key_value), blocks((p.R + kQueries - 1) / kQueries), size(kQueries * p.D),
        width(kQueries * p.columns), transposed(scratch<T>({p.heads() * blocks * 2 * size})),
        plain(scratch<T>({key_value ? p.heads() * blocks * 2 * width : 0})),
        lse(scratch<float>({p.heads() * blocks * kQueries})), delta(scratch<float>({p.heads() * blocks * kQueries})) {
    const Rows<T> sources[2] = {{query_BHLD, p, true}, {grad_BHLD, p, true}};
    const Tensor lse_BHL1 = lse_BHL.unsqueeze(-1), delta_BHL1 = delta_BHL.unsqueeze(-1);
    const Rows<float> lses(lse_BHL1, p, true), deltas(delta_BHL1, p, true);
    deal(p.heads() * blocks, [&](int64_t item) {
      const int64_t head = item / blocks, first = item % blocks * kQueries, count = rows(item % blocks);
      const Tensor gathered = scratch<T>({size});
      for (int64_t i = 0; i < 2; ++i) {
        T* const copy = gathered.data_ptr<T>();
        gather(sources[i], head, first, count, kQueries, p.D, copy);
        pack_transposed(copy, p.D, count, p.D, transposed.data_ptr<T>() + (2 * item + i) * size);
        if (key_value) pack(copy, p.D, round_up(count, 16), p.D, plain.data_ptr<T>() + (2 * item + i) * width);
      }
      for (int64_t r = 0; r < kQueries; ++r) {
        // A row without keys has lse = -inf; with inf its probabilities are 0, as those of the rows that fill the block.
        const float its = r < count ? *lses.at(head, first + r) : kNegInf;
        lse.data_ptr<float>()[item * kQueries + r] = its == kNegInf ? -kNegInf : its * kLog2e;
        delta.data_ptr<float>()[item * kQueries + r] = r < count ? *deltas.at(head, first + r) : 0.f;
      }
    });
  }

  int64_t rows(int64_t block) const { return std::min(kQueries, p.R - block * kQueries); }
};

// From the scores and dP [keys, 64] of a panel of rows: probabilities and gradients [keys, 128], where wanted, and the
// gradients' transpose [64, 96], with zeros from `keys` to a multiple of 16. The first key is seen from column `hidden` on,
// each further one from G columns further on.
template <class T>
__attribute__((target("avx512bf16"))) void to_gradients(int64_t keys, int64_t hidden, int64_t G, float factor,
                                                        const float* lse, const float* delta, const float* scores,
                                                        const float* grad_probabilities, T* probabilities, T* gradients,
                                                        T* transposed) {
  for (int64_t c = 0; c < kPanel; c += 16) {
    const Vec lses = load(lse + c), deltas = load(delta + c);
    for (int64_t k = 0; k < keys; k += 16) {
      Vec block[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t at = (k + i) * kPanel + c, to = (k + i) * kQueries + c;
        Vec e = exp2(_mm512_fmsub_ps(load(scores + at), splat(factor), lses));
        e = _mm512_maskz_mov_ps(k + i < keys ? ~first_lanes(hidden + (k + i) * G - c) : 0, e);
        block[i] = e * (load(grad_probabilities + at) - deltas);
        if (k + i >= keys) block[i] = _mm512_setzero_ps();
        if (!probabilities) continue;
        store_quick(probabilities + to, e);
        store_quick(gradients + to, block[i]);
      }
      transpose(block);
      for (int64_t i = 0; i < 16; ++i) store_quick(transposed + (c + i) * kKeys + k, block[i]);
    }
  }
}

// What one thread holds while its blocks of keys meet the rows of a head.
template <class T>
class Meeting {
 public:
  explicit Meeting(const PackedRows<T>& rows)
      : p(rows.p), rows(rows), packed_key(scratch<T>({kKeys * p.columns})), probabilities(scratch<T>({kKeys * kQueries})),
        gradients(scratch<T>({kKeys * kQueries})), transposed(scratch<T>({kQueries * kKeys})),
        scores(scratch<float>({kKeys * kPanel})), grad_probabilities(scratch<float>({kKeys * kPanel})) {}

  // The keys from `start`; adds to grad_query [R, D], and writes the block's rows of grad_key and grad_value unless null.
  void keys(const Rows<T>& key, const Rows<T>& value, int64_t head, int64_t start, float* grad_query, float* grad_key,
            float* grad_value) {
    count = std::min(kKeys, p.Lk - start), depth = round_up(count, 16);
    pack_padded(key.at(head, start), key.position, count, depth, p.D, copy, packed_key.data_ptr<T>());
    const int64_t first = p.causal ? start * p.G / kQueries : 0;
    for (int64_t block = first; block < rows.blocks; ++block) {
      const int64_t at = head * rows.blocks + block;
      to_operands(key, value, head, start, block, grad_key != nullptr);
      if (grad_key) {
        const T* const plain = rows.plain.template const_data_ptr<T>() + 2 * at * rows.width;
        add(gradients, round_up(rows.rows(block), 16), plain, block > first, grad_key);
        add(probabilities, round_up(rows.rows(block), 16), plain + rows.width, block > first, grad_value);
      }
      const T* b = packed_key.const_data_ptr<T>();
      for (int64_t d = 0; d < p.D; d += kPanel, b += depth * kPanel) {
        gemm(rows.rows(block), std::min(kPanel, p.D - d), depth, transposed.const_data_ptr<T>(), kKeys, b,
             grad_query + block * kQueries * p.D + d, p.D, true);
      }
    }
    for (int64_t i = 0; grad_key && i < count * p.D; ++i) grad_key[i] *= p.scale;
  }

 private:
  void to_operands(const Rows<T>& key, const Rows<T>& value, int64_t head, int64_t start, int64_t block, bool key_value) {
    const int64_t at = head * rows.blocks + block;
    const T* const query = rows.transposed.template const_data_ptr<T>() + 2 * at * rows.size;
    float *const s = scores.data_ptr<float>(), *const dp = grad_probabilities.data_ptr<float>();
    for (int64_t c = 0; c < rows.rows(block); c += kPanel) {
      gemm(count, kPanel, p.D, key.at(head, start), key.position, query + c * p.D, s, kPanel, false);
      gemm(count, kPanel, p.D, value.at(head, start), value.position, query + rows.size + c * p.D, dp, kPanel, false);
      const int64_t hidden = p.causal ? start * p.G - block * kQueries - c : -kKeys * p.G, each = p.causal ? p.G : 0;
      to_gradients(count, hidden, each, p.scale * kLog2e, rows.lse.template const_data_ptr<float>() + at * kQueries + c,
                   rows.delta.template const_data_ptr<float>() + at * kQueries + c, s, dp,
                   key_value ? probabilities.data_ptr<T>() + c : nullptr, gradients.data_ptr<T>() + c,
                   transposed.data_ptr<T>() + c * kKeys);
    }
  }

  // out [keys, D] (+)= A [keys, width] B
  void add(const Tensor& A, int64_t width, const T* B, bool more, float* out) const {
    for (int64_t d = 0; d < p.D; d += kPanel, B += width * kPanel) {
      gemm(count, std::min(kPanel, p.D - d), width, A.const_data_ptr<T>(), kQueries, B, out + d, p.D, more);
    }
  }

  const Problem& p;
  const PackedRows<T>& rows;
  Tensor packed_key, probabilities, gradients, transposed, scores, grad_probabilities;
  std::vector<T> copy;
  int64_t count = 0, depth = 0;
};

// sums [shares, heads, R padded, D] -> grad_query [B, Hq, Lq, D]
void add_up(const Problem& p, const Tensor& sums, Tensor& grad_query) {
  const int64_t shares = sums.size(0), stride = sums.stride(0), padded = sums.size(2);
  const Rows<float> out(grad_query, p, true);
  deal(p.heads() * p.Lq, [&](int64_t item) {
    const int64_t head = item / p.Lq, first = item % p.Lq * p.G;
    for (int64_t r = first; r < first + p.G; ++r) {
      const float* const from = sums.const_data_ptr<float>() + (head * padded + r) * p.D;
      float* const to = out.at(head, r);
      for (int64_t d = 0; d < p.D; d += 16) {
        const __mmask16 some = first_lanes(p.D - d);
        Vec sum = _mm512_maskz_loadu_ps(some, from + d);
        for (int64_t share = 1; share < shares; ++share) sum += _mm512_maskz_loadu_ps(some, from + share * stride + d);
        _mm512_mask_storeu_ps(to + d, some, sum * splat(p.scale));
      }
    }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
Gradients backward(const Problem& p, const PackedRows<T>& rows, const Tensor& key_BHLD, const Tensor& value_BHLD) {
  const Rows<T> key(key_BHLD, p, false), value(value_BHLD, p, false);
  const int64_t blocks = (p.Lk + kKeys - 1) / kKeys, shares = parts(p.heads(), blocks);
  const at::TensorOptions options(at::kFloat);
  const Tensor sums = at::zeros({shares, p.heads(), rows.blocks * kQueries, p.D}, options);
  const auto of_keys = [&] { return rows.key_value ? at::empty({p.B, p.Hkv, p.Lk, p.D}, options) : at::empty({0}, options); };
  Tensor grad_query = at::empty({p.B, p.Hq, p.Lq, p.D}, options), grad_key = of_keys(), grad_value = of_keys();
  deal(p.heads() * shares, [&](int64_t item) {
    const int64_t head = item / shares, share = item % shares;
    float* const sum = sums.data_ptr<float>() + share * sums.stride(0) + head * sums.stride(1);
    Meeting<T> meeting(rows);
    for (int64_t start = share * kKeys; start < p.Lk; start += shares * kKeys) {
      const int64_t at = (head * p.Lk + start) * p.D;
      meeting.keys(key, value, head, start, sum, rows.key_value ? grad_key.data_ptr<float>() + at : nullptr,
                   rows.key_value ? grad_value.data_ptr<float>() + at : nullptr);
    }
  });
  add_up(p, sums, grad_query);
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
  const Problem problem(query, key, scale, causal);
  const Tensor delta = (grad_out * out.to(at::kFloat)).sum(-1, false, at::kFloat);
  const auto run = [&]<class T>(T) {
    const Tensor grad = rows_contiguous(grad_out.to(query.scalar_type()));
    const PackedRows<T> rows(problem, rows_contiguous(query), grad, lse, delta, key_value);
    return backward<T>(problem, rows, rows_contiguous(key), rows_contiguous(value));
  };
  return query.scalar_type() == at::kFloat ? run(0.f) : run(c10::BFloat16());
}

}  // namespace

TORCH_LIBRARY_IMPL(opsdl, CPU, m) { m.impl("attend_backward", attend_backward); }

}  // namespace opsdl
