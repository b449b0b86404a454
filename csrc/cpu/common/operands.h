// What the operators on a block of tokens share: their arguments as pointers, and operands in the layout of gemm.h.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "common/gemm.h"
#include "common/vec.h"

namespace opsdl {

using at::Tensor;
using Maybe = std::optional<Tensor>;

template <class T>
const T* data(const Maybe& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
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

}  // namespace opsdl
