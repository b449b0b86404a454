// The backward of the losses on the CPU with a skip_tolerance, where each step of the vocabulary keeps some tokens of a block:
//
//   select_gradient      the gradient for the logits of the tokens that each step keeps, in few bytes
//   selected_gradient    the two products with what several blocks kept, so that dWeight is read and written once for all
//
// Threads divide the vocabulary; for a fixed number of them the result is the same to the bit.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "common/operands.h"
#include "loss/block.h"
#include "loss/products.h"

namespace opsdl {
namespace {

// One panel's kept columns (bits of `some`) of the step's gradient, written side by side from `to`, rows of which are `ld`
// apart.
template <class T>
void keep_columns(const Block<Stored<T>>& block, int64_t step, int64_t panel, uint64_t some, int64_t ld, float* grad, T* to) {
  const int64_t entries = std::min(kStep, block.V - step * kStep);
  alignas(64) T packed[16];
  for (int64_t entry = 0; entry < entries; entry += kEntries) {
    block.gradient((step * kStep + entry) / kEntries, panel, grad, kPanel);
    for (int64_t v = 0; v < std::min(kEntries, entries - entry); ++v) {
      T* next = to + (entry + v) * ld;
      for (int64_t c = 0; c < kPanel; c += 16) {
        const __mmask16 mask = some >> c;
        store(packed, _mm512_maskz_compress_ps(mask, load(grad + v * kPanel + c)));
        std::memcpy(next, packed, __builtin_popcount(mask) * sizeof(T));
        next += __builtin_popcount(mask);
      }
    }
  }
}

// kept [steps, N]; offsets [steps + 1]: how many tokens the steps before keep. Returns, of step s, the gradient for the raw
// logits of its 256 entries and kept tokens, row by row from 256 offsets[s].
template <class T>
Tensor select(const Block<Stored<T>>& block, const Tensor& kept_sN, const Tensor& offsets) {
  const int64_t steps = kept_sN.size(0), *const begin = offsets.const_data_ptr<int64_t>();
  const bool* const keep = kept_sN.const_data_ptr<bool>();
  Tensor out = at::empty({kStep * begin[steps]}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  at::parallel_for(0, steps, 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    std::vector<float> grad(kEntries * kPanel);
    for (int64_t step = first; step < last; ++step) {
      const int64_t count = begin[step + 1] - begin[step], entries = std::min(kStep, block.V - step * kStep);
      T* const to = out.data_ptr<T>() + kStep * begin[step];
      std::fill_n(to + entries * count, (kStep - entries) * count, T(0.f));
      for (int64_t panel = 0, at = 0; panel < block.P; ++panel) {
        const int64_t width = std::min(kPanel, block.N - panel * kPanel);
        uint64_t some = 0;
        for (int64_t c = 0; c < width; ++c) some |= uint64_t(keep[step * block.N + panel * kPanel + c]) << c;
        if (some) keep_columns<T>(block, step, panel, some, count, grad.data(), to + at);
        at += __builtin_popcountll(some);
      }
    }
  });
  return out;
}

template <class T>
void chosen_gradient(const Tensor& hidden_NH, const Tensor& weight_VH, at::TensorList grads, at::TensorList offsets,
                     at::TensorList tokens, Maybe grad_hidden_NH, const Maybe& grad_weight_VH, const Maybe& grad_bias_V,
                     bool accumulate) {
  const int64_t N = hidden_NH.size(0), H = hidden_NH.size(1), V = weight_VH.size(0);
  const Tensor sums = hidden_sums(grad_hidden_NH, N, H);
  at::parallel_for(0, (V + kStep - 1) / kStep, 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    Products<T> products(weight_VH, grad_weight_VH, grad_bias_V, accumulate, N, sums);
    std::vector<T> copy, hidden;
    std::vector<int64_t> some;
    for (int64_t step = first; step < last; ++step) {
      some.clear();
      for (size_t block = 0; block < grads.size(); ++block) {
        const int64_t* const begin = offsets[block].const_data_ptr<int64_t>() + step;
        const int64_t* const list = tokens[block].const_data_ptr<int64_t>();
        some.insert(some.end(), list + begin[0], list + begin[1]);
      }
      const int64_t count = some.size(), C = std::max<int64_t>(16, (count + 15) / 16 * 16);
      if (!count && (accumulate || !grad_weight_VH)) continue;
      products.rows.assign(kStep * C, T(0.f)), products.columns.resize(C * kStep);
      for (size_t block = 0, at = 0; block < grads.size(); ++block) {
        const int64_t* const begin = offsets[block].const_data_ptr<int64_t>() + step;
        const int64_t width = begin[1] - begin[0];
        const T* from = grads[block].const_data_ptr<T>() + kStep * begin[0];
        for (int64_t v = 0; v < kStep; ++v, from += width) {
          std::memcpy(products.rows.data() + v * C + at, from, width * sizeof(T));
        }
        at += width;
      }
      to_operands(products.rows.data(), C, C, static_cast<T*>(nullptr), products.columns.data());
      if (grad_weight_VH) pack_rows(hidden_NH, some.data(), count, C, copy, hidden);
      products.add(step, C, hidden.data(), some.data(), count);
    }
    at::native::cpublas::brgemm_release();
  });
  add_up(sums, grad_hidden_NH, N, H);
}

Tensor select_gradient(const Tensor& stored_e, const Maybe& stored_gap, const Tensor& on_e_kn, const Maybe& on_gap_kn,
                       const Maybe& tokens_n, const Maybe& at_token_n, const Tensor& kept_sN, const Tensor& offsets,
                       int64_t vocabulary) {
  const auto run = [&]<class T>(T) {
    const Block<Stored<T>> block(stored_e, stored_gap, on_e_kn, on_gap_kn, tokens_n, at_token_n, kept_sN.size(1), vocabulary);
    return select<T>(block, kept_sN, offsets);
  };
  return stored_e.scalar_type() == at::kHalf ? run(c10::BFloat16()) : run(0.f);
}

void selected_gradient(const Tensor& hidden_NH, const Tensor& weight_VH, at::TensorList grads, at::TensorList offsets,
                       at::TensorList tokens, const Maybe& grad_hidden_NH, const Maybe& grad_weight_VH,
                       const Maybe& grad_bias_V, bool accumulate) {
  const auto run = hidden_NH.scalar_type() == at::kBFloat16 ? chosen_gradient<c10::BFloat16> : chosen_gradient<float>;
  run(hidden_NH, weight_VH, grads, offsets, tokens, grad_hidden_NH, grad_weight_VH, grad_bias_V, accumulate);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opsdl, m) {
  m.def(
      "select_gradient(Tensor stored_e, Tensor? stored_gap, Tensor on_e, Tensor? on_gap, Tensor? tokens, Tensor? at_token, "
      "Tensor kept, Tensor offsets, int vocabulary) -> Tensor");
  m.def(
      "selected_gradient(Tensor hidden, Tensor weight, Tensor[] grads, Tensor[] offsets, Tensor[] tokens, "
      "Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, bool accumulate) -> ()");
}

TORCH_LIBRARY_IMPL(opsdl, CPU, m) {
  m.impl("select_gradient", select_gradient);
  m.impl("selected_gradient", selected_gradient);
}

}  // namespace opsdl
