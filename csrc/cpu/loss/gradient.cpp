// The backward of the losses on the CPU. block_moments (moments.cpp) left two numbers for every logit of a block; with factors of
// each tile and token they give the gradient for the logits, and that the two products:
//
//   block_gradient       of all tokens, step by step of the vocabulary; the gradient for the logits stays in cache
//   select_gradient      of the tokens that each step keeps: the gradient for the logits, kept in few bytes
//   selected_gradient    the two products with what several blocks kept, so that dWeight is read and written once for all
//
// Threads divide the vocabulary; for a fixed number of them the result is the same to the bit.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "common/operands.h"
#include "loss/tile.h"

namespace opsdl {
namespace {

// Vocabulary entries of one step: two tiles, so that the product for dHidden is deep enough.
constexpr int64_t kStep = 2 * kRows;

// A block as block_moments left it, and what its numbers are to be multiplied with.
template <class S>
struct Block {
  const S *e, *gap;
  const float *on_e, *on_gap;  // [tiles, P * 64]
  const int64_t* tokens;
  const float* at_token;  // the gradient at the sampled token
  int64_t N, P, V;

  Block(const Tensor& stored_e, const Maybe& stored_gap, const Tensor& on_e_kn, const Maybe& on_gap_kn, const Maybe& tokens_n,
        const Maybe& at_token_n, int64_t N, int64_t V)
      : e(stored_e.const_data_ptr<S>()),
        gap(data<S>(stored_gap)),
        on_e(on_e_kn.const_data_ptr<float>()),
        on_gap(data<float>(on_gap_kn)),
        tokens(data<int64_t>(tokens_n)),
        at_token(data<float>(at_token_n)),
        N(N),
        P(panels(N)),
        V(V) {}

  // The gradient for the raw logits of one tile and panel: its rows of 64 floats are ld apart.
  void gradient(int64_t tile, int64_t panel, float* grad, int64_t ld) const {
    const int64_t start = tile * kRows, rows = std::min(kRows, V - start), at = tile * P + panel;
    const S *const e_tile = e + at * kRows * kPanel, *const gap_tile = gap ? gap + at * kRows * kPanel : nullptr;
    for (int64_t c = 0; c < kPanel; c += 16) {
      const Vec factor = load(on_e + at * kPanel + c);
      const Vec gap_factor = gap ? load(on_gap + at * kPanel + c) : _mm512_setzero_ps();
      for (int64_t v = 0; v < rows; ++v) {
        Vec value = factor * load(e_tile + v * kPanel + c);
        if (gap) value = _mm512_fmadd_ps(gap_factor, load(gap_tile + v * kPanel + c), value);
        store(grad + v * ld + c, value);
      }
    }
    for (int64_t n = panel * kPanel; tokens && n < std::min((panel + 1) * kPanel, N); ++n) {
      const int64_t row = tokens[n] - start;
      if (row >= 0 && row < rows) grad[row * ld + n - panel * kPanel] = at_token[n];
    }
  }
};

// What the two products with a step's gradient [256, C] need: its rows for dWeight, its columns for dHidden.
template <class Source, class T>
void to_operands(const Source* grad, int64_t ld, int64_t C, T* rows, T* columns) {
  for (int64_t v = 0; v < kStep; v += 16) {
    for (int64_t c = 0; c < C; c += 16) {
      Vec block[16];
      for (int64_t i = 0; i < 16; ++i) {
        block[i] = load(grad + (v + i) * ld + c);
        if (rows) store(rows + (v + i) * C + c, block[i]);
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
Tensor hidden_sums(const Maybe& grad_hidden_NH, int64_t N, int64_t H) {
  if (!grad_hidden_NH) return Tensor();
  return at::zeros({at::get_num_threads(), panels(H), N, kPanel}, at::TensorOptions(at::kFloat));
}

void add_up(const Tensor& sums, Maybe grad_hidden_NH, int64_t N, int64_t H) {
  if (!grad_hidden_NH) return;
  grad_hidden_NH->copy_(sums.sum(0).permute({1, 0, 2}).reshape({N, panels(H) * kPanel}).narrow(1, 0, H));
}

// Packs `count` rows of hidden [N, H], those named or the first, and zeros up to C: the B of dWeight.
template <class T>
void pack_rows(const Tensor& hidden_NH, const int64_t* some, int64_t count, int64_t C, std::vector<T>& copy, std::vector<T>& out) {
  const int64_t H = hidden_NH.size(1);
  copy.resize(C * H);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(copy.data() + i * H, hidden_NH.const_data_ptr<T>() + (some ? some[i] : i) * H, H * sizeof(T));
  }
  std::fill(copy.begin() + count * H, copy.end(), T(0.f));
  out.resize(panels(H) * C * kPanel);
  pack(copy.data(), H, C, H, out.data());
}

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
      const int64_t rows = std::min(kStep, V - step * kStep);
      std::fill(grad.begin() + rows * C, grad.end(), 0.f);
      for (int64_t row = 0; row < rows; row += kRows) {
        for (int64_t panel = 0; panel < block.P; ++panel) {
          block.gradient((step * kStep + row) / kRows, panel, grad.data() + row * C + panel * kPanel, C);
        }
      }
      to_operands(grad.data(), C, C, products.rows.data(), products.columns.data());
      products.add(step, C, hidden.data(), nullptr, N);
    }
    at::native::cpublas::brgemm_release();
  });
  add_up(sums, grad_hidden_NH, N, H);
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
    std::vector<float> grad(kRows * kPanel);
    std::vector<T> chosen(kPanel);
    for (int64_t step = first; step < last; ++step) {
      const int64_t count = begin[step + 1] - begin[step], rows = std::min(kStep, block.V - step * kStep);
      T* const to = out.data_ptr<T>() + kStep * begin[step];
      std::fill_n(to + rows * count, (kStep - rows) * count, T(0.f));
      for (int64_t panel = 0, at = 0; panel < block.P; ++panel) {
        const int64_t width = std::min(kPanel, block.N - panel * kPanel);
        uint64_t some = 0;
        for (int64_t c = 0; c < width; ++c) some |= uint64_t(keep[step * block.N + panel * kPanel + c]) << c;
        if (!some) continue;
        for (int64_t row = 0; row < rows; row += kRows) {
          block.gradient((step * kStep + row) / kRows, panel, grad.data(), kPanel);
          for (int64_t v = 0; v < std::min(kRows, rows - row); ++v) {
            T* next = to + (row + v) * count + at;
            for (int64_t c = 0; c < kPanel; c += 16) {
              const __mmask16 mask = some >> c;
              alignas(64) T packed[16];
              store(packed, _mm512_maskz_compress_ps(mask, load(grad.data() + v * kPanel + c)));
              std::memcpy(next, packed, __builtin_popcount(mask) * sizeof(T));
              next += __builtin_popcount(mask);
            }
          }
        }
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
      "block_gradient(Tensor hidden, Tensor weight, Tensor stored_e, Tensor? stored_gap, Tensor on_e, Tensor? on_gap, "
      "Tensor? tokens, Tensor? at_token, Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, "
      "bool accumulate) -> ()");
  m.def(
      "select_gradient(Tensor stored_e, Tensor? stored_gap, Tensor on_e, Tensor? on_gap, Tensor? tokens, Tensor? at_token, "
      "Tensor kept, Tensor offsets, int vocabulary) -> Tensor");
  m.def(
      "selected_gradient(Tensor hidden, Tensor weight, Tensor[] grads, Tensor[] offsets, Tensor[] tokens, "
      "Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, bool accumulate) -> ()");
}

TORCH_LIBRARY_IMPL(opsdl, CPU, m) {
  m.impl("block_gradient", block_gradient);
  m.impl("select_gradient", select_gradient);
  m.impl("selected_gradient", selected_gradient);
}

}  // namespace opsdl
