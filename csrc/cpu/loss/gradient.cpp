// The backward of the losses on the CPU. block_moments (moments.cpp) left two numbers for every logit of a block; with factors
// of each tile and token they give the gradient for the logits, and that the two products:
//
//   block_gradient       of all tokens, step by step of the vocabulary; the gradient for the logits stays in cache
//
// selected.cpp has the same for tokens that do not keep every step. Threads divide the vocabulary; for a fixed number of them
// the result is the same to the bit.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "common/operands.h"
#include "loss/block.h"
#include "loss/products.h"

namespace opsdl {
namespace {

template <class T>
void all_gradient(const Tensor& hidden_NH, const Tensor& weight_VH, const Block<Stored<T>>& block, Maybe grad_hidden_NH,
                  const Maybe& grad_weight_VH, const Maybe& grad_bias_V, bool accumulate) {
  const int64_t N = hidden_NH.size(0), H = hidden_NH.size(1), V = weight_VH.size(0), C = block.P * kPanel;
  const Tensor sums = hidden_sums(grad_hidden_NH, N, H);
  std::vector<T> copy, hidden;
  if (grad_weight_VH) pack_rows(hidden_NH, nullptr, N, C, copy, hidden);
  at::parallel_for(0, (V + kStep - 1) / kStep, 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    Products<T> products(weight_VH, grad_weight_VH, grad_bias_V, accumulate, N, sums);
    products.rows.resize(kStep * C), products.columns.resize(C * kStep);
    std::vector<float> grad(kStep * C);
    for (int64_t step = first; step < last; ++step) {
      const int64_t entries = std::min(kStep, V - step * kStep);
      std::fill(grad.begin() + entries * C, grad.end(), 0.f);
      for (int64_t entry = 0; entry < entries; entry += kEntries) {
        for (int64_t panel = 0; panel < block.P; ++panel) {
          block.gradient((step * kStep + entry) / kEntries, panel, grad.data() + entry * C + panel * kPanel, C);
        }
      }
      to_operands(grad.data(), C, C, products.rows.data(), products.columns.data());
      products.add(step, C, hidden.data(), nullptr, N);
    }
    at::native::cpublas::brgemm_release();
  });
  add_up(sums, grad_hidden_NH, N, H);
}

void block_gradient(const Tensor& hidden_NH, const Tensor& weight_VH, const Tensor& stored_e, const Maybe& stored_gap,
                    const Tensor& on_e_kn, const Maybe& on_gap_kn, const Maybe& tokens_n, const Maybe& at_token_n,
                    const Maybe& grad_hidden_NH, const Maybe& grad_weight_VH, const Maybe& grad_bias_V, bool accumulate) {
  const auto run = [&]<class T>(T) {
    const Block<Stored<T>> block(stored_e, stored_gap, on_e_kn, on_gap_kn, tokens_n, at_token_n, hidden_NH.size(0),
                                 weight_VH.size(0));
    all_gradient<T>(hidden_NH, weight_VH, block, grad_hidden_NH, grad_weight_VH, grad_bias_V, accumulate);
  };
  hidden_NH.scalar_type() == at::kBFloat16 ? run(c10::BFloat16()) : run(0.f);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opsdl, m) {
  m.def(
      "block_gradient(Tensor hidden, Tensor weight, Tensor stored_e, Tensor? stored_gap, Tensor on_e, Tensor? on_gap, "
      "Tensor? tokens, Tensor? at_token, Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, "
      "bool accumulate) -> ()");
}

TORCH_LIBRARY_IMPL(opsdl, CPU, m) { m.impl("block_gradient", block_gradient); }

}  // namespace opsdl
