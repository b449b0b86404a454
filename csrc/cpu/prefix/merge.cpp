// Partial attention states [S, N, H, D] and [S, N, H], over disjoint sets of keys, merged into one.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "common/operands.h"

namespace opsdl {
namespace {

// A part without keys has no weight. Its lse is -inf; some flash kernels write +inf.
template <class T>
T weight(T lse, T of_all) {
  return std::isinf(lse) ? T(0) : std::exp(lse - of_all);
}

template <class T>
T logsumexp(const T* lse, int64_t S, int64_t stride) {
  T top = -std::numeric_limits<T>::infinity(), sum = 0;
  for (int64_t s = 0; s < S; ++s) top = std::isinf(lse[s * stride]) ? top : std::max(top, lse[s * stride]);
  for (int64_t s = 0; s < S; ++s) sum += weight(lse[s * stride], top);
  return sum == 0 ? top : top + std::log(sum);
}

void check(const Tensor& outs, const Tensor& lses) {
  TORCH_CHECK(outs.dim() == 4 && outs.size(0) > 0 && outs.size(3) > 0, "merge_states: out is ", outs.sizes(),
              "; expected [S, N, H, D] with S and D above 0");
  TORCH_CHECK(lses.sizes() == outs.sizes().slice(0, 3), "merge_states: lse is ", lses.sizes(), " and out ", outs.sizes());
  TORCH_CHECK(
      outs.scalar_type() == lses.scalar_type() && (outs.scalar_type() == at::kFloat || outs.scalar_type() == at::kDouble),
      "merge_states: out is ", outs.scalar_type(), " and lse ", lses.scalar_type(), "; expected both float32 or float64");
}

// body(row) for every row of D numbers and an lse, on all threads.
template <class Body>
void over_rows(int64_t rows, int64_t D, const Body& body) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 4096 / D), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) body(row);
  });
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out, const Tensor& lse) {
  check(out, lse);
  const Tensor outs = out.contiguous(), lses = lse.contiguous();
  const int64_t S = outs.size(0), D = outs.size(3), rows = outs.size(1) * outs.size(2);
  Tensor merged = at::zeros(outs.sizes().slice(1), outs.options()),
         merged_lse = at::empty(lses.sizes().slice(1), lses.options());
  AT_DISPATCH_FLOATING_TYPES(outs.scalar_type(), "merge_states", [&] {
    const scalar_t *const o = outs.const_data_ptr<scalar_t>(), *const l = lses.const_data_ptr<scalar_t>();
    scalar_t *const to = merged.data_ptr<scalar_t>(), *const to_lse = merged_lse.data_ptr<scalar_t>();
    over_rows(rows, D, [&](int64_t row) {
      to_lse[row] = logsumexp(l + row, S, rows);
      for (int64_t s = 0; s < S; ++s) {
        const scalar_t w = weight(l[s * rows + row], to_lse[row]);
        if (w == 0) continue;  // whatever an empty part's out holds
        for (int64_t d = 0; d < D; ++d) to[row * D + d] += w * o[(s * rows + row) * D + d];
      }
    });
  });
  return {merged, merged_lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(opsdl, CPU, m) { m.impl("merge_states", merge_states); }

}  // namespace opsdl
