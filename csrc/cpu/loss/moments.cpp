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

// What the second product reads; nothing without a teacher.
struct Second {
  const Maybe &gap_NK, &gap_low_NK, &gap_weight_VK, &gap_bias_V, &difference_N;
};

// The operands of a block, packed once, and what is written.
template <class T>
struct Moments {
  using S = Stored<T>;
  const Tensor& weight_VH;
  const float* bias;
  const Second& with;
  const int64_t* tokens;
  LogitMap map;
  int64_t N, H, K, V, P, tiles;
  std::vector<T> hidden, second, low;
  std::vector<bool> has_low;      // by panel
  std::vector<float> difference;  // 1 for tokens whose second product is a difference
  float *out, *picked;            // [kFields, tiles, P * 64], [3, N]
  S *e_out, *gap_out;

  Moments(const Tensor& hidden_NH, const Tensor& weight_VH, const Maybe& bias_V, const Second& with, const Maybe& tokens_N,
          LogitMap map, const Maybe& stored_e, const Maybe& stored_gap)
      : weight_VH(weight_VH),
        bias(data<float>(bias_V)),
        with(with),
        tokens(data<int64_t>(tokens_N)),
        map(map),
        N(hidden_NH.size(0)),
        H(hidden_NH.size(1)),
        K(with.gap_NK ? with.gap_NK->size(1) : 0),
        V(weight_VH.size(0)),
        P(panels(N)),
        tiles((V + kEntries - 1) / kEntries),
        hidden(pack_transposed<T>(hidden_NH)),
        has_low(P, false),
        difference(P * kPanel, 0.f),
        e_out(stored_e ? stored_e->data_ptr<S>() : nullptr),
        gap_out(stored_gap ? stored_gap->data_ptr<S>() : nullptr) {
    if (with.gap_NK) second = pack_transposed<T>(*with.gap_NK);
    if (with.gap_NK) std::copy_n(with.difference_N->const_data_ptr<float>(), N, difference.begin());
    if (!with.gap_low_NK) return;
    low = pack_transposed<T>(*with.gap_low_NK);
    for (int64_t panel = 0; panel < P; ++panel) {
      has_low[panel] = with.gap_low_NK->slice(0, panel * kPanel, (panel + 1) * kPanel).any().item<bool>();
    }
  }

  // One tile and panel: A has the tile's entries of the student's head, A2 those of the second product's.
  void panel(int64_t tile, int64_t panel, const T* A, const T* A2, float* z, float* gap, float* slope) const {
    const int64_t start = tile * kEntries, entries = std::min(kEntries, V - start);
    gemm(entries, kPanel, H, A, H, hidden.data() + panel * H * kPanel, z, kPanel, false);
    if (gap) gemm(entries, kPanel, K, A2, K, second.data() + panel * K * kPanel, gap, kPanel, false);
    if (has_low[panel]) gemm(entries, kPanel, K, A2, K, low.data() + panel * K * kPanel, gap, kPanel, true);
    const float* const gap_bias = data<float>(with.gap_bias_V);
    for (int64_t c = 0; c < kPanel; c += 16) {
      to_logits(entries, map, bias ? bias + start : nullptr, gap_bias ? gap_bias + start : nullptr,
                load(&difference[panel * kPanel + c]), z + c, gap ? gap + c : nullptr, slope + c);
    }
    if (tokens) pick(start, entries, panel, z, gap, slope);
    const int64_t offset = (tile * P + panel) * kEntries * kPanel;
    for (int64_t c = 0; c < kPanel; c += 16) {
      to_moments(entries, map.cap > 0, z + c, gap ? gap + c : nullptr, slope + c, e_out ? e_out + offset + c : nullptr,
                 gap_out ? gap_out + offset + c : nullptr, out + tile * P * kPanel + panel * kPanel + c, tiles * P * kPanel);
    }
  }

  // Logit, gap and slope at the sampled tokens that the tile holds.
  void pick(int64_t start, int64_t entries, int64_t panel, const float* z, const float* gap, const float* slope) const {
    for (int64_t c = 0; c < std::min(kPanel, N - panel * kPanel); ++c) {
      const int64_t n = panel * kPanel + c, entry = tokens[n] - start;
      if (entry < 0 || entry >= entries) continue;
      picked[n] = z[entry * kPanel + c];
      if (gap) picked[N + n] = z[entry * kPanel + c] == kNegInf ? kNegInf : gap[entry * kPanel + c];
      picked[2 * N + n] = (map.cap > 0 ? slope[entry * kPanel + c] : 1.f) / map.temperature;
    }
  }
};

template <class T>
std::tuple<Tensor, Tensor> moments(Moments<T>&& block, const at::TensorOptions& options) {
  Tensor moments_fkn = at::empty({kFields, block.tiles, block.P * kPanel}, options.dtype(at::kFloat));
  Tensor picked_3n = at::zeros({3, block.N}, moments_fkn.options());
  block.out = moments_fkn.data_ptr<float>(), block.picked = picked_3n.data_ptr<float>();
  const bool teacher = block.with.gap_NK.has_value(), shared = teacher && block.with.gap_weight_VK->is_same(block.weight_VH);
  at::parallel_for(0, block.tiles, 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    std::vector<T> copy, gap_copy;
    const auto scratch = std::make_unique<float[]>(3 * kEntries * kPanel);
    float *const z = scratch.get(), *const gap = teacher ? z + kEntries * kPanel : nullptr;
    for (int64_t tile = first; tile < last; ++tile) {
      const T* const A = tile_rows(block.weight_VH, tile * kEntries, kEntries, copy);
      const T* A2 = nullptr;
      if (teacher) A2 = shared ? A : tile_rows(*block.with.gap_weight_VK, tile * kEntries, kEntries, gap_copy);
      for (int64_t panel = 0; panel < block.P; ++panel) block.panel(tile, panel, A, A2, z, gap, z + 2 * kEntries * kPanel);
    }
    at::native::cpublas::brgemm_release();
  });
  return {moments_fkn.narrow(2, 0, block.N), picked_3n};
}

std::tuple<Tensor, Tensor> block_moments(const Tensor& hidden_NH, const Tensor& weight_VH, const Maybe& bias_V,
                                         const Maybe& gap_NK, const Maybe& gap_low_NK, const Maybe& gap_weight_VK,
                                         const Maybe& gap_bias_V, const Maybe& difference_N, const Maybe& tokens_N,
                                         double temperature, double cap, const Maybe& stored_e, const Maybe& stored_gap) {
  const LogitMap map{static_cast<float>(temperature), static_cast<float>(cap)};
  const Second with{gap_NK, gap_low_NK, gap_weight_VK, gap_bias_V, difference_N};
  const auto run = [&]<class T>(T) {
    return moments(Moments<T>(hidden_NH, weight_VH, bias_V, with, tokens_N, map, stored_e, stored_gap), hidden_NH.options());
  };
  return hidden_NH.scalar_type() == at::kBFloat16 ? run(c10::BFloat16()) : run(0.f);
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
