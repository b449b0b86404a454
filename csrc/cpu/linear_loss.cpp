// The losses of one block of tokens on the CPU: two operators around the per-token arithmetic of opsdl/losses.
//
//   block_moments    both products of every vocabulary tile and, while the tile is in cache, its moments; keeps two numbers
//                    of at most 16 (bf16) or 32 bits for every logit
//   block_gradient   those numbers and per-token factors give the gradient for the logits, tile by tile, and the two
//                    products with it
//
// So a block costs the four products of the plain formula; no logit is computed twice, and none leaves the cache.
// Threads divide the vocabulary; for a fixed number of them the result is the same to the bit.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <vector>

#include "tile.h"

namespace opsdl {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

template <class T>
const T* data(const Maybe& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

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

// Tiny probabilities must not cost the hundreds of cycles of denormal arithmetic.
struct FlushDenormals {
  const unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
};

// `height` rows of a head from `start` in the arithmetic's type: where they lie, or converted into `copy`, with zeros after
// the last of the head.
template <class T>
const T* tile_rows(const Tensor& weight_VH, int64_t start, int64_t height, std::vector<T>& copy) {
  const int64_t H = weight_VH.size(1), rows = std::min(height, weight_VH.size(0) - start);
  if (weight_VH.scalar_type() == c10::CppTypeToScalarType<T>::value && weight_VH.is_contiguous() && rows == height) {
    return weight_VH.const_data_ptr<T>() + start * H;
  }
  copy.resize(height * H);
  Tensor out = at::from_blob(copy.data(), {height, H}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  out.narrow(0, 0, rows).copy_(weight_VH.narrow(0, start, rows));
  out.narrow(0, rows, height - rows).zero_();
  return copy.data();
}

// [N, K] -> packed panels of its transpose [K, N]: the B of a product whose columns are tokens.
template <class T>
std::vector<T> pack_transposed(const Tensor& x_NK) {
  const Tensor x_KN = x_NK.t().contiguous();
  std::vector<T> out(panels(x_KN.size(1)) * x_KN.size(0) * kPanel);
  pack(x_KN.const_data_ptr<T>(), x_KN.size(1), x_KN.size(0), x_KN.size(1), out.data());
  return out;
}

// dtype of the stored numbers: bf16 products deserve no more than fp16's 11 bits.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, float>, float, c10::Half>;

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

// The gradient for the raw logits of one tile and panel, [rows, 64] floats.
template <class S>
void to_gradient(int64_t rows, const S* e, const S* gap, const float* on_e, const float* on_gap, float* grad) {
  for (int64_t c = 0; c < kPanel; c += 16) {
    const Vec factor = load(on_e + c), gap_factor = gap ? load(on_gap + c) : _mm512_setzero_ps();
    for (int64_t v = 0; v < rows; ++v) {
      Vec value = factor * load(e + v * kPanel + c);
      if (gap) value = _mm512_fmadd_ps(gap_factor, load(gap + v * kPanel + c), value);
      store(grad + v * kPanel + c, value);
    }
  }
}

// Vocabulary entries of one step of the gradient: two tiles, so that the product for dHidden is deep enough.
constexpr int64_t kStep = 2 * kRows;

// Copies the kept columns of a panel to consecutive columns of `out`, whose rows have room for a panel more.
void compress(int64_t rows, const float* grad, const __mmask16* kept, float* out, int64_t ld) {
  for (int64_t v = 0; v < rows; ++v) {
    float* to = out + v * ld;
    for (int64_t c = 0; c < kPanel; c += 16) {
      store(to, _mm512_maskz_compress_ps(kept[c / 16], load(grad + v * kPanel + c)));
      to += __builtin_popcount(kept[c / 16]);
    }
  }
}

// The tokens that a step of the vocabulary works on: all of them, or those that one of its tiles keeps.
struct Kept {
  std::vector<int64_t> tokens;
  std::vector<__mmask16> masks;  // of 16 tokens each

  void select(const bool* keep_kn, int64_t tiles, int64_t N, int64_t P) {
    tokens.clear();
    masks.assign(P * kPanel / 16, 0);
    for (int64_t n = 0; n < N; ++n) {
      bool keep = !keep_kn;
      for (int64_t tile = 0; keep_kn && tile < tiles; ++tile) keep |= keep_kn[tile * N + n];
      if (!keep) continue;
      tokens.push_back(n);
      masks[n / 16] |= 1u << n % 16;
    }
  }
};

// Packs the rows of hidden [N, H] of these tokens, and zeros up to C, as the B of dWeight.
template <class T>
void pack_rows(const Tensor& hidden_NH, const std::vector<int64_t>& tokens, int64_t C, std::vector<T>& rows, T* out) {
  const int64_t H = hidden_NH.size(1);
  rows.assign(C * H, T(0.f));
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::memcpy(rows.data() + i * H, hidden_NH.const_data_ptr<T>() + tokens[i] * H, H * sizeof(T));
  }
  pack(rows.data(), H, C, H, out);
}

// What the two products with the gradient [256, C] need: its rows for dWeight, its columns for dHidden.
template <class T>
void to_operands(const float* grad, int64_t ld, int64_t C, T* rows, T* columns) {
  for (int64_t v = 0; v < kStep; v += 16) {
    for (int64_t c = 0; c < C; c += 16) {
      Vec block[16];
      for (int64_t i = 0; i < 16; ++i) {
        block[i] = load(grad + (v + i) * ld + c);
        store(rows + (v + i) * C + c, block[i]);
      }
      transpose(block);
      for (int64_t i = 0; i < 16; ++i) store(columns + (c + i) * kStep + v, block[i]);
    }
  }
}

// One step's rows of dWeight; straight in bf16 where this block is the only one.
template <class T>
void weight_gradient(int64_t rows, int64_t C, const T* grad, const T* hidden, int64_t start, Tensor& out_VH, bool accumulate) {
  const int64_t H = out_VH.size(1);
  float* const wide = out_VH.scalar_type() == at::kFloat ? out_VH.data_ptr<float>() + start * H : nullptr;
  alignas(64) float part[kStep * kPanel];
  for (int64_t h = 0; h < H; h += kPanel, hidden += C * kPanel) {
    const int64_t width = std::min(kPanel, H - h);
    if (wide) {
      gemm(rows, width, C, grad, C, hidden, wide + h, H, accumulate);
      continue;
    }
    gemm(rows, width, C, grad, C, hidden, part, kPanel, false);
    for (int64_t v = 0; v < rows; ++v) {
      c10::BFloat16 row[kPanel];
      for (int64_t c = 0; c < kPanel; c += 16) store(row + c, load(part + v * kPanel + c));
      std::memcpy(out_VH.data_ptr<c10::BFloat16>() + (start + v) * H + h, row, width * sizeof(c10::BFloat16));
    }
  }
}

// dHidden [C, H] of one step, added to the tokens' rows of the thread's sum [H / 64, N, 64].
template <class T>
void hidden_gradient(const std::vector<int64_t>& tokens, int64_t C, int64_t N, int64_t H, const T* grad, const T* weight,
                     std::vector<float>& part, float* sum) {
  part.resize(C * kPanel);
  for (int64_t h = 0; h < panels(H); ++h, weight += kStep * kPanel, sum += N * kPanel) {
    const bool all = static_cast<int64_t>(tokens.size()) == N;
    gemm(all ? N : C, kPanel, kStep, grad, kStep, weight, all ? sum : part.data(), kPanel, all);
    for (size_t i = 0; !all && i < tokens.size(); ++i) {
      for (int64_t c = 0; c < kPanel; c += 16) {
        float* to = sum + tokens[i] * kPanel + c;
        store(to, load(to) + load(part.data() + i * kPanel + c));
      }
    }
  }
}

template <class T>
void gradient(const Tensor& hidden_NH, const Tensor& weight_VH, const Tensor& stored_e, const Maybe& stored_gap,
              const Tensor& on_e_kn, const Maybe& on_gap_kn, const Maybe& tokens_n, const Maybe& at_token_n,
              const Maybe& kept_kn, Maybe grad_hidden_NH, Maybe grad_weight_VH, const Maybe& grad_bias_V, bool accumulate) {
  using S = Stored<T>;
  const int64_t N = hidden_NH.size(0), H = hidden_NH.size(1), V = weight_VH.size(0);
  const int64_t tiles = on_e_kn.size(0), P = panels(N), ld = (P + 1) * kPanel;
  const S* const e = stored_e.const_data_ptr<S>();
  const S* const gap = data<S>(stored_gap);
  const float* const on_e = on_e_kn.const_data_ptr<float>();
  const float* const on_gap = data<float>(on_gap_kn);
  const int64_t* const tokens = data<int64_t>(tokens_n);
  const float* const at_token = data<float>(at_token_n);
  const bool* const keep = data<bool>(kept_kn);
  // dHidden of each thread's tiles, in panels of 64 columns, so that a product touches neighbouring memory only.
  Tensor sums = grad_hidden_NH ? at::zeros({at::get_num_threads(), panels(H), N, kPanel}, on_e_kn.options()) : Tensor();
  std::vector<T> all_hidden(grad_weight_VH && !keep ? panels(H) * P * kPanel * kPanel : 0);
  if (!all_hidden.empty()) {
    Kept all;
    std::vector<T> rows;
    all.select(nullptr, 0, N, P);
    pack_rows(hidden_NH, all.tokens, P * kPanel, rows, all_hidden.data());
  }

  at::parallel_for(0, (V + kStep - 1) / kStep, 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    std::vector<T> copy, rows_operand(kStep * P * kPanel), columns_operand(P * kPanel * kStep), rows_copy;
    std::vector<T> hidden(keep && grad_weight_VH ? panels(H) * P * kPanel * kPanel : 0);
    std::vector<T> weight(grad_hidden_NH ? panels(H) * kStep * kPanel : 0);
    std::vector<float> panel_grad(kRows * kPanel), grad(kStep * ld), part;
    float* const sum = grad_hidden_NH ? sums.data_ptr<float>() + at::get_thread_num() * panels(H) * N * kPanel : nullptr;
    Kept kept;
    for (int64_t step = first; step < last; ++step) {
      const int64_t start = step * kStep, rows = std::min(kStep, V - start), end = std::min(tiles, 2 * step + 2);
      kept.select(keep ? keep + 2 * step * N : nullptr, end - 2 * step, N, P);
      const int64_t count = kept.tokens.size(), C = keep ? (count + 15) / 16 * 16 : P * kPanel;
      for (int64_t v = rows; v < kStep; ++v) std::fill_n(grad.data() + v * ld, C, 0.f);
      for (int64_t tile = 2 * step; tile < end; ++tile) {
        const int64_t tile_start = tile * kRows, height = std::min(kRows, V - tile_start);
        for (int64_t panel = 0, at = 0; panel < P; ++panel) {
          const int64_t offset = (tile * P + panel) * kRows * kPanel, n0 = panel * kPanel;
          int64_t some = 0;
          for (int64_t c = 0; c < kPanel; c += 16) some += __builtin_popcount(kept.masks[(n0 + c) / 16]);
          if (!some) continue;
          to_gradient(height, e + offset, gap ? gap + offset : nullptr, on_e + (tile * P + panel) * kPanel,
                      gap ? on_gap + (tile * P + panel) * kPanel : nullptr, panel_grad.data());
          for (int64_t n = n0; tokens && n < std::min(n0 + kPanel, N); ++n) {
            const int64_t row = tokens[n] - tile_start;
            if (row >= 0 && row < height) panel_grad[row * kPanel + n - n0] = at_token[n];
          }
          compress(height, panel_grad.data(), &kept.masks[n0 / 16], grad.data() + (tile_start - start) * ld + at, ld);
          at += some;
        }
      }
      for (int64_t v = 0; v < rows; ++v) std::fill_n(grad.data() + v * ld + count, C - count, 0.f);
      to_operands(grad.data(), ld, C, rows_operand.data(), columns_operand.data());
      for (int64_t v = 0; grad_bias_V && v < rows; ++v) {
        Vec total = _mm512_setzero_ps();
        for (int64_t c = 0; c < C; c += 16) total += load(grad.data() + v * ld + c);
        grad_bias_V->data_ptr<float>()[start + v] += _mm512_reduce_add_ps(total);
      }
      if (grad_weight_VH && (count || !accumulate)) {
        if (keep) pack_rows(hidden_NH, kept.tokens, std::max<int64_t>(C, 16), rows_copy, hidden.data());
        if (!C) std::fill(rows_operand.begin(), rows_operand.begin() + kStep * 16, T(0.f));
        weight_gradient(rows, std::max<int64_t>(C, 16), rows_operand.data(), keep ? hidden.data() : all_hidden.data(), start,
                        *grad_weight_VH, accumulate);
      }
      if (sum && count) {
        pack(tile_rows(weight_VH, start, kStep, copy), H, kStep, H, weight.data());
        hidden_gradient(kept.tokens, C, N, H, columns_operand.data(), weight.data(), part, sum);
      }
    }
    at::native::cpublas::brgemm_release();
  });
  if (grad_hidden_NH) {
    grad_hidden_NH->copy_(sums.sum(0).permute({1, 0, 2}).reshape({N, panels(H) * kPanel}).narrow(1, 0, H));
  }
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

void block_gradient(const Tensor& hidden_NH, const Tensor& weight_VH, const Tensor& stored_e, const Maybe& stored_gap,
                    const Tensor& on_e_kn, const Maybe& on_gap_kn, const Maybe& tokens_n, const Maybe& at_token_n,
                    const Maybe& kept_kn, const Maybe& grad_hidden_NH, const Maybe& grad_weight_VH,
                    const Maybe& grad_bias_V, bool accumulate) {
  const auto run = hidden_NH.scalar_type() == at::kBFloat16 ? gradient<c10::BFloat16> : gradient<float>;
  run(hidden_NH, weight_VH, stored_e, stored_gap, on_e_kn, on_gap_kn, tokens_n, at_token_n, kept_kn, grad_hidden_NH,
      grad_weight_VH, grad_bias_V, accumulate);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opsdl, m) {
  m.def("cpu_has_bf16", has_bf16);
  m.def("empty_huge(int[] size, ScalarType dtype) -> Tensor", empty_huge);
  m.def(
      "block_moments(Tensor hidden, Tensor weight, Tensor? bias, Tensor? gap_hidden, Tensor? gap_low, Tensor? gap_weight, "
      "Tensor? gap_bias, Tensor? difference, Tensor? tokens, float temperature, float cap, Tensor(a!)? stored_e, "
      "Tensor(b!)? stored_gap) -> (Tensor, Tensor)");
  m.def(
      "block_gradient(Tensor hidden, Tensor weight, Tensor stored_e, Tensor? stored_gap, Tensor on_e, Tensor? on_gap, "
      "Tensor? tokens, Tensor? at_token, Tensor? kept, Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, "
      "bool accumulate) -> ()");
}

TORCH_LIBRARY_IMPL(opsdl, CPU, m) {
  m.impl("block_moments", block_moments);
  m.impl("block_gradient", block_gradient);
}

}  // namespace opsdl
