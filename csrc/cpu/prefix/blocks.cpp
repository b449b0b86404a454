// Tokens in and out of the blocks of a pool [blocks, block_size, Hkv, D]: copies of bytes, whatever the dtype.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

#include "common/operands.h"

namespace opsdl {
namespace {

void check_pool(const char* name, const Tensor& pool) {
  TORCH_CHECK(pool.dim() == 4 && pool.is_contiguous() && pool.numel() > 0, name, ": pool is ", pool.sizes(),
              "; expected contiguous, non-empty [blocks, block_size, Hkv, D]");
}

// `indices` as int64, all in [0, limit).
Tensor checked(const char* name, const char* what, const Tensor& indices, int64_t limit) {
  TORCH_CHECK(indices.dim() == 1 && at::isIntegralType(indices.scalar_type(), false), name, ": ", what, " is ",
              indices.scalar_type(), " ", indices.sizes(), "; expected integers in one dimension");
  const Tensor out = indices.to(at::kLong).contiguous();
  for (int64_t i = 0; i < out.numel(); ++i) {
    const int64_t index = out.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(index >= 0 && index < limit, name, ": ", what, "[", i, "] is ", index, "; expected 0 to ", limit - 1);
  }
  return out;
}

// copy(i) for runs of `size` bytes, on all threads where that pays.
template <class Copy>
void each(int64_t count, int64_t size, const Copy& copy) {
  at::parallel_for(0, count, std::max<int64_t>(1, (1 << 16) / size), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) copy(i);
  });
}

void append_tokens(Tensor pool, const Tensor& tokens_NHD, const Tensor& slots_N) {
  check_pool("append_tokens", pool);
  const Tensor slots = checked("append_tokens", "slots", slots_N, pool.size(0) * pool.size(1));
  TORCH_CHECK(tokens_NHD.sizes() == at::IntArrayRef({slots.numel(), pool.size(2), pool.size(3)}) &&
                  tokens_NHD.scalar_type() == pool.scalar_type(),
              "append_tokens: tokens are ", tokens_NHD.scalar_type(), " ", tokens_NHD.sizes(), " for ", slots.numel(),
              " slots of a pool ", pool.scalar_type(), " ", pool.sizes());
  const Tensor tokens = tokens_NHD.contiguous();
  const int64_t size = pool.stride(1) * pool.element_size();
  char* const to = static_cast<char*>(pool.mutable_data_ptr());
  const char* const from = static_cast<const char*>(tokens.const_data_ptr());
  const int64_t* const slot = slots.const_data_ptr<int64_t>();
  each(slots.numel(), size, [&](int64_t i) { std::memcpy(to + slot[i] * size, from + i * size, size); });
}

Tensor gather_tokens(const Tensor& pool, const Tensor& block_table, int64_t length) {
  check_pool("gather_tokens", pool);
  const Tensor table = checked("gather_tokens", "block_table", block_table, pool.size(0));
  TORCH_CHECK(length >= 0 && length <= table.numel() * pool.size(1), "gather_tokens: length is ", length,
              " and block_table has ", table.numel(), " blocks of ", pool.size(1));
  Tensor out = at::empty({length, pool.size(2), pool.size(3)}, pool.options());
  const int64_t size = pool.stride(0) * pool.element_size(), bytes = length * pool.stride(1) * pool.element_size();
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const char* const from = static_cast<const char*>(pool.const_data_ptr());
  each((bytes + size - 1) / size, size, [&](int64_t i) {
    std::memcpy(to + i * size, from + table.const_data_ptr<int64_t>()[i] * size, std::min(size, bytes - i * size));
  });
  return out;
}

void copy_blocks(Tensor pool, const Tensor& sources, const Tensor& targets) {
  check_pool("copy_blocks", pool);
  const Tensor from = checked("copy_blocks", "sources", sources, pool.size(0));
  const Tensor to = checked("copy_blocks", "targets", targets, pool.size(0));
  TORCH_CHECK(from.numel() == to.numel(), "copy_blocks: ", from.numel(), " sources and ", to.numel(), " targets");
  const int64_t size = pool.stride(0) * pool.element_size();
  char* const base = static_cast<char*>(pool.mutable_data_ptr());
  for (int64_t i = 0; i < from.numel(); ++i) {
    std::memmove(base + to.const_data_ptr<int64_t>()[i] * size, base + from.const_data_ptr<int64_t>()[i] * size, size);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(opsdl, CPU, m) {
  m.impl("append_tokens", append_tokens);
  m.impl("gather_tokens", gather_tokens);
  m.impl("copy_blocks", copy_blocks);
}

}  // namespace opsdl
