// The two products with the gradient for the logits, dWeight and dHidden, step by step of the vocabulary.
#pragma once

#include <ATen/Parallel.h>

#include "common/operands.h"
#include "loss/block.h"

namespace opsdl {

// One step's entries of dWeight; straight in bf16 where this block is the only one.
template <class T>
void weight_gradient(int64_t entries, int64_t C, const T* grad, const T* hidden, int64_t start, Tensor& out_VH,
                     bool accumulate) {
  const int64_t H = out_VH.size(1);
  float* const wide = out_VH.scalar_type() == at::kFloat ? out_VH.data_ptr<float>() + start * H : nullptr;
  alignas(64) float part[kStep * kPanel];
  for (int64_t h = 0; h < H; h += kPanel, hidden += C * kPanel) {
    const int64_t width = std::min(kPanel, H - h);
    if (wide) {
      gemm(entries, width, C, grad, C, hidden, wide + h, H, accumulate);
      continue;
    }
    gemm(entries, width, C, grad, C, hidden, part, kPanel, false);
    for (int64_t v = 0; v < entries; ++v) {
      c10::BFloat16 row[kPanel];
      for (int64_t c = 0; c < kPanel; c += 16) store(row + c, load(part + v * kPanel + c));
      std::memcpy(out_VH.data_ptr<c10::BFloat16>() + (start + v) * H + h, row, width * sizeof(c10::BFloat16));
    }
  }
}

// dHidden of one step, added to the thread's sum [H / 64, N, 64]: to all of its tokens, or to the rows named.
template <class T>
void hidden_gradient(const int64_t* some, int64_t count, int64_t N, int64_t H, const T* grad, const T* weight,
                     std::vector<float>& part, float* sum) {
  part.resize(count * kPanel);
  for (int64_t h = 0; h < panels(H); ++h, weight += kStep * kPanel, sum += N * kPanel) {
    gemm(count, kPanel, kStep, grad, kStep, weight, some ? part.data() : sum, kPanel, !some);
    for (int64_t i = 0; some && i < count; ++i) {
      for (int64_t c = 0; c < kPanel; c += 16) {
        float* to = sum + some[i] * kPanel + c;
        store(to, load(to) + load(part.data() + i * kPanel + c));
      }
    }
  }
}

// A thread's part of both products, and of dBias.
template <class T>
struct Products {
  const Tensor& weight_VH;
  Maybe grad_weight_VH;
  const Maybe& grad_bias_V;
  bool accumulate;
  int64_t N, H, V;
  float* sum;  // dHidden [H / 64, N, 64], or null
  std::vector<T> rows, columns, copy, weight;
  std::vector<float> part;

  Products(const Tensor& weight_VH, const Maybe& grad_weight_VH, const Maybe& grad_bias_V, bool accumulate, int64_t N,
           const Tensor& sums)
      : weight_VH(weight_VH),
        grad_weight_VH(grad_weight_VH),
        grad_bias_V(grad_bias_V),
        accumulate(accumulate),
        N(N),
        H(weight_VH.size(1)),
        V(weight_VH.size(0)),
        sum(sums.defined() ? sums.data_ptr<float>() + at::get_thread_num() * panels(H) * N * kPanel : nullptr),
        weight(sum ? panels(H) * kStep * kPanel : 0) {}

  // Of the step whose gradient's operands are in `rows` and `columns`, C tokens wide; hidden is packed, of as many rows.
  void add(int64_t step, int64_t C, const T* hidden, const int64_t* some, int64_t count) {
    const int64_t start = step * kStep, height = std::min(kStep, V - start);
    for (int64_t v = 0; grad_bias_V && v < height; ++v) {
      Vec total = _mm512_setzero_ps();
      for (int64_t c = 0; c < C; c += 16) total += load(rows.data() + v * C + c);
      grad_bias_V->data_ptr<float>()[start + v] += _mm512_reduce_add_ps(total);
    }
    if (grad_weight_VH) weight_gradient(height, C, rows.data(), hidden, start, *grad_weight_VH, accumulate);
    if (sum && count) {
      pack(tile_rows(weight_VH, start, kStep, copy), H, kStep, H, weight.data());
      hidden_gradient(some, count, N, H, columns.data(), weight.data(), part, sum);
    }
  }
};

// Sums of the threads, [threads, H / 64, N, 64]: panels of 64 columns, so that a product touches neighbouring memory only.
inline Tensor hidden_sums(const Maybe& grad_hidden_NH, int64_t N, int64_t H) {
  if (!grad_hidden_NH) return Tensor();
  return at::zeros({at::get_num_threads(), panels(H), N, kPanel}, at::TensorOptions(at::kFloat));
}

inline void add_up(const Tensor& sums, Maybe grad_hidden_NH, int64_t N, int64_t H) {
  if (!grad_hidden_NH) return;
  grad_hidden_NH->copy_(sums.sum(0).permute({1, 0, 2}).reshape({N, panels(H) * kPanel}).narrow(1, 0, H));
}

// Packs `count` rows of hidden [N, H], those named or the first, and zeros up to C: the B of dWeight.
template <class T>
void pack_rows(const Tensor& hidden_NH, const int64_t* some, int64_t count, int64_t C, std::vector<T>& copy,
               std::vector<T>& out) {
  const int64_t H = hidden_NH.size(1);
  copy.resize(C * H);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(copy.data() + i * H, hidden_NH.const_data_ptr<T>() + (some ? some[i] : i) * H, H * sizeof(T));
  }
  std::fill(copy.begin() + count * H, copy.end(), T(0.f));
  out.resize(panels(H) * C * kPanel);
  pack(copy.data(), H, C, H, out.data());
}

}  // namespace opsdl
