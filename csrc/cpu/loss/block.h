// A block of tokens as block_moments (moments.cpp) left it, and the gradient for its logits.
#pragma once

#include "common/operands.h"
#include "loss/tile.h"

namespace opsdl {

// Vocabulary entries of one step: two tiles, so that the product for dHidden is deep enough.
constexpr int64_t kStep = 2 * kEntries;

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

  // The gradient for the raw logits of one tile and panel: entries of 64 floats are ld apart.
  void gradient(int64_t tile, int64_t panel, float* grad, int64_t ld) const {
    const int64_t start = tile * kEntries, entries = std::min(kEntries, V - start), at = tile * P + panel;
    const S *const e_tile = e + at * kEntries * kPanel, *const gap_tile = gap ? gap + at * kEntries * kPanel : nullptr;
    for (int64_t c = 0; c < kPanel; c += 16) {
      const Vec factor = load(on_e + at * kPanel + c);
      const Vec gap_factor = gap ? load(on_gap + at * kPanel + c) : _mm512_setzero_ps();
      for (int64_t v = 0; v < entries; ++v) {
        Vec value = factor * load(e_tile + v * kPanel + c);
        if (gap) value = _mm512_fmadd_ps(gap_factor, load(gap_tile + v * kPanel + c), value);
        store(grad + v * ld + c, value);
      }
    }
    for (int64_t n = panel * kPanel; tokens && n < std::min((panel + 1) * kPanel, N); ++n) {
      const int64_t entry = tokens[n] - start;
      if (entry >= 0 && entry < entries) grad[entry * ld + n - panel * kPanel] = at_token[n];
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

}  // namespace opsdl
