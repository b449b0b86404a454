// The forward of the losses on the CPU for one block of tokens:
//
//   block_moments    both products of every vocabulary tile and, while the tile is in cache, its moments; keeps two numbers
//                    of at most 16 (bf16) or 32 bits for every logit, from which gradient.cpp goes on
//
// So a block costs the four products of the plain formula; no logit is computed twice, and none leaves the cache.
// Threads divide the vocabulary; for a fixed number of them the result is the same to the bit.
#include <ATen/Parallel.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <memory>

#include "common/operands.h"
#include "loss/tile.h"

namespace opsdl {
namespace {

// Uninitialised memory in huge pages, where the system gives them on request: the first touch of a gradient of 1 GB costs
// 0.3 s in small pages and 0.1 s in huge ones.
Tensor empty_huge(at::IntArrayRef sizes, at::ScalarType dtype) {
  Tensor out = at::empty(sizes, at::TensorOptions(dtype));
  constexpr uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(out.data_ptr()), first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + out.nbytes()) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return out;
}

template <class T>
std::tuple<Tensor, Tensor> moments(const Tensor& hidden_NH, const Tensor& weight_VH, const Maybe& bias_V,
                                   const Maybe& gap_NK, const Maybe& gap_low_NK, const Maybe& gap_weight_VK,
                                   const Maybe& gap_bias_V, const Maybe& difference_N, const Maybe& tokens_N, LogitMap map,
                                   const Maybe& stored_e, const Maybe& stored_gap) {
  using S = Stored<T>;
  const int64_t N = hidden_NH.size(0), H = hidden_NH.size(1), V = weight_VH.size(0);
  const int64_t K = gap_NK ? gap_NK->size(1) : 0, P = panels(N), tiles = (V + kRows - 1) / kRows;
  const bool shared = gap_NK && gap_weight_VK->is_same(weight_VH);
  const std::vector<T> hidden = pack_transposed<T>(hidden_NH);
  const std::vector<T> second = gap_NK ? pack_transposed<T>(*gap_NK) : std::vector<T>();
  const std::vector<T> low = gap_low_NK ? pack_transposed<T>(*gap_low_NK) : std::vector<T>();
  std::vector<bool> has_low(P, false);
  for (int64_t panel = 0; gap_low_NK && panel < P; ++panel) {
    has_low[panel] = gap_low_NK->slice(0, panel * kPanel, (panel + 1) * kPanel).any().item<bool>();
  }
  std::vector<float> difference(P * kPanel, 0.f);
  if (gap_NK) std::copy_n(difference_N->const_data_ptr<float>(), N, difference.begin());

  Tensor moments_fkn = at::empty({kFields, tiles, P * kPanel}, hidden_NH.options().dtype(at::kFloat));
  Tensor picked_3n = at::zeros({3, N}, moments_fkn.options());
  float* const out = moments_fkn.data_ptr<float>();
  float* const picked = picked_3n.data_ptr<float>();
  S* const e_out = stored_e ? stored_e->data_ptr<S>() : nullptr;
  S* const gap_out = stored_gap ? stored_gap->data_ptr<S>() : nullptr;
  const int64_t* tokens = data<int64_t>(tokens_N);

  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    std::vector<T> copy, gap_copy;
    auto scratch = std::make_unique<float[]>(3 * kRows * kPanel);
    float *const z = scratch.get(), *const gap = gap_NK ? z + kRows * kPanel : nullptr, *const slope = z + 2 * kRows * kPanel;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t start = tile * kRows, rows = std::min(kRows, V - start);
      const T* A = tile_rows(weight_VH, start, kRows, copy);
      const T* A2 = !gap ? nullptr : shared ? A : tile_rows(*gap_weight_VK, start, kRows, gap_copy);
      for (int64_t panel = 0; panel < P; ++panel) {
        gemm(rows, kPanel, H, A, H, hidden.data() + panel * H * kPanel, z, kPanel, false);
        if (gap) gemm(rows, kPanel, K, A2, K, second.data() + panel * K * kPanel, gap, kPanel, false);
        if (has_low[panel]) gemm(rows, kPanel, K, A2, K, low.data() + panel * K * kPanel, gap, kPanel, true);
        const int64_t offset = (tile * P + panel) * kRows * kPanel, width = std::min(kPanel, N - panel * kPanel);
        for (int64_t c = 0; c < kPanel; c += 16) {
          to_logits(rows, map, bias_V ? data<float>(bias_V) + start : nullptr,
                    gap_bias_V ? data<float>(gap_bias_V) + start : nullptr, load(&difference[panel * kPanel + c]), z + c,
                    gap ? gap + c : nullptr, slope + c);
        }
        for (int64_t c = 0; tokens && c < width; ++c) {
          const int64_t n = panel * kPanel + c, row = tokens[n] - start;
          if (row < 0 || row >= rows) continue;
          picked[n] = z[row * kPanel + c];
          if (gap) picked[N + n] = z[row * kPanel + c] == kNegInf ? kNegInf : gap[row * kPanel + c];
          picked[2 * N + n] = (map.cap > 0 ? slope[row * kPanel + c] : 1.f) / map.temperature;
        }
        for (int64_t c = 0; c < kPanel; c += 16) {
          to_moments(rows, map.cap > 0, z + c, gap ? gap + c : nullptr, slope + c, e_out ? e_out + offset + c : nullptr,
                     gap_out ? gap_out + offset + c : nullptr, out + tile * P * kPanel + panel * kPanel + c,
                     tiles * P * kPanel);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return {moments_fkn.narrow(2, 0, N), picked_3n};
}

std::tuple<Tensor, Tensor> block_moments(const Tensor& hidden_NH, const Tensor& weight_VH, const Maybe& bias_V,
                                         const Maybe& gap_NK, const Maybe& gap_low_NK, const Maybe& gap_weight_VK,
                                         const Maybe& gap_bias_V, const Maybe& difference_N, const Maybe& tokens_N,
                                         double temperature, double cap, const Maybe& stored_e, const Maybe& stored_gap) {
  const auto run = hidden_NH.scalar_type() == at::kBFloat16 ? moments<c10::BFloat16> : moments<float>;
  const LogitMap map{static_cast<float>(temperature), static_cast<float>(cap)};
  return run(hidden_NH, weight_VH, bias_V, gap_NK, gap_low_NK, gap_weight_VK, gap_bias_V, difference_N, tokens_N, map,
             stored_e, stored_gap);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opsdl, m) {
  m.def("cpu_has_bf16", has_bf16);
  m.def("empty_huge(int[] size, ScalarType dtype) -> Tensor", empty_huge);
  m.def(
      "block_moments(Tensor hidden, Tensor weight, Tensor? bias, Tensor? gap_hidden, Tensor? gap_low, Tensor? gap_weight, "
      "Tensor? gap_bias, Tensor? difference, Tensor? tokens, float temperature, float cap, Tensor(a!)? stored_e, "
      "Tensor(b!)? stored_gap) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(opsdl, CPU, m) { m.impl("block_moments", block_moments); }

}  // namespace opsdl
