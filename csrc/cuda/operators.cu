// The operators of opsdl/prefix/attention/operators.py on CUDA, through torch's stable ABI: one library, built against any
// torch from 2.10 on, a CPU build included, that loads into all of them.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "blocks.cuh"
#include "decode.cuh"
#include "merge.cuh"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Only libtorch_cuda.so has it. Weak, so that a CPU build of torch can load this library too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace opsdl {
namespace {

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

void check_device(const char* name, const Tensor& x, const Tensor& as) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == as.get_device_index(), name, ": expected all tensors on one GPU");
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

Tensor empty_float(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// ---- merging

Tensor checked(const Tensor& x, std::initializer_list<int64_t> sizes) {
  bool fits = x.scalar_type() == ScalarType::Float && x.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = x.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(fits, "merge_states: expected float32 out [S, N, H, D] and lse [S, N, H], S > 0");
  return torch::stable::contiguous(x);
}

unsigned merge_grid(int64_t rows) { return static_cast<unsigned>((rows + kMergeThreads / 32 - 1) / (kMergeThreads / 32)); }

std::tuple<Tensor, Tensor> merge(const Tensor& out_parts, const Tensor& lse_parts) {
  STD_TORCH_CHECK(out_parts.dim() == 4 && out_parts.size(0) > 0, "merge_states: out: expected [S, N, H, D], S > 0");
  const int64_t S = out_parts.size(0), N = out_parts.size(1), H = out_parts.size(2), D = out_parts.size(3);
  check_device("merge_states", out_parts, out_parts);
  check_device("merge_states", lse_parts, out_parts);
  const Tensor outs = checked(out_parts, {S, N, H, D}), lses = checked(lse_parts, {S, N, H});
  const torch::stable::accelerator::DeviceGuard guard(outs.get_device_index());
  Tensor out = empty_float(outs, {N, H, D}), lse = empty_float(outs, {N, H});
  if (N * H > 0) {
    merge_states<<<merge_grid(N * H), kMergeThreads, 0, stream_of(outs)>>>(data<float>(outs), data<float>(lses),
                                                                           data<float>(out), data<float>(lse),
                                                                           static_cast<int>(S), N * H, static_cast<int>(D));
    check_launch("merge_states");
  }
  return {out, lse};
}

// ---- decoding

template <class Kernel>
void launch_decode(Kernel kernel, size_t shared, int queries_each, int splits, const DecodeArguments& x, cudaStream_t stream) {
  const int queries = x.R * (x.Hq / x.Hkv);
  const dim3 grid(splits, x.Hkv, (queries + queries_each - 1) / queries_each);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  kernel<<<grid, kDecodeThreads, shared, stream>>>(x);
  check_launch("prefix_decode");
}

template <int kWidth>
void launch_decode(ScalarType type, int splits, const DecodeArguments& x, cudaStream_t stream) {
  if (type == ScalarType::Float) {
    launch_decode(decode_float<kWidth>, sizeof(FloatTile<kWidth>), FloatTile<kWidth>::kQueries, splits, x, stream);
  } else if (type == ScalarType::BFloat16) {
    launch_decode(decode_half<Bf16, kWidth>, sizeof(HalfTile<kWidth>), HalfTile<kWidth>::kQueries, splits, x, stream);
  } else {
    launch_decode(decode_half<Fp16, kWidth>, sizeof(HalfTile<kWidth>), HalfTile<kWidth>::kQueries, splits, x, stream);
  }
}

// Keys of a split: whole tiles of 64, and about four thread blocks a multiprocessor in all.
int keys_of_split(int64_t length, int64_t thread_blocks_a_split) {
  const int64_t tiles = (length + 63) / 64,
                splits = std::clamp<int64_t>(4 * 132 / thread_blocks_a_split, 1, std::min<int64_t>(tiles, 128));
  return static_cast<int>((tiles + splits - 1) / splits * 64);
}

std::tuple<Tensor, Tensor> prefix_decode(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const std::optional<Tensor>& block_table, int64_t length, double scale) {
  const ScalarType type = query.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "prefix_decode: query: expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(query.dim() == 3 && query.numel() > 0, "prefix_decode: query: expected non-empty [R, Hq, D]");
  const bool in_pool = block_table.has_value();
  const int tokens = in_pool ? 1 : 0;  // the dimension of tokens (of a block)
  STD_TORCH_CHECK(key.dim() == tokens + 3 && key.scalar_type() == type && value.scalar_type() == type,
                  "prefix_decode: key and value: expected the dtype of query, and [L, Hkv, D] or pools [blocks, size, Hkv, D]");
  check_device("prefix_decode", query, query);
  check_device("prefix_decode", key, query);
  check_device("prefix_decode", value, query);
  if (in_pool) check_device("prefix_decode", *block_table, query);
  const int64_t D = query.size(2), Hkv = key.size(tokens + 1), unit = type == ScalarType::Float ? 4 : 8;
  STD_TORCH_CHECK(key.numel() > 0 && key.size(tokens + 2) == D && query.size(1) % Hkv == 0,
                  "prefix_decode: key: expected D of query and Hq % Hkv == 0");
  STD_TORCH_CHECK(D % unit == 0 && D <= 128, "prefix_decode: D is ", D, "; expected a multiple of ", unit, " up to 128");
  for (int i = 0; i < key.dim(); ++i) {
    STD_TORCH_CHECK(value.size(i) == key.size(i) && value.stride(i) == key.stride(i), "prefix_decode: value: expected as key");
    STD_TORCH_CHECK(i == tokens + 2 ? key.stride(i) == 1 : key.stride(i) % unit == 0,
                    "prefix_decode: key: expected numbers in a row, and rows that start at 16 bytes");
  }
  const Tensor q = torch::stable::contiguous(query);
  const auto starts_at = [](const Tensor& x, int bytes) { return reinterpret_cast<uintptr_t>(x.data_ptr()) % bytes == 0; };
  STD_TORCH_CHECK(starts_at(key, 16) && starts_at(value, 16) && starts_at(q, 4),
                  "prefix_decode: expected key and value to start at 16 bytes, query at 4");
  const int64_t held = in_pool ? block_table->numel() * key.size(1) : key.size(0);
  STD_TORCH_CHECK(length > 0 && length <= held && length < (1 << 30), "prefix_decode: length is ", length, " of ", held,
                  " tokens");
  STD_TORCH_CHECK(!in_pool || (block_table->scalar_type() == ScalarType::Int && block_table->is_contiguous()),
                  "prefix_decode: block_table: expected contiguous int32");

  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const int64_t R = q.size(0), Hq = q.size(1), queries = R * (Hq / Hkv), wide = type == ScalarType::Float ? 32 : 64;
  const int each = keys_of_split(length, Hkv * ((queries + wide - 1) / wide));
  const int splits = static_cast<int>((length + each - 1) / each);
  Tensor outs = empty_float(q, {splits, R, Hq, D}), lses = empty_float(q, {splits, R, Hq});
  const DecodeArguments arguments = {q.data_ptr(),
                                     key.data_ptr(),
                                     value.data_ptr(),
                                     in_pool ? data<int>(*block_table) : nullptr,
                                     data<float>(outs),
                                     data<float>(lses),
                                     static_cast<int>(R),
                                     static_cast<int>(Hq),
                                     static_cast<int>(Hkv),
                                     static_cast<int>(D),
                                     static_cast<int>(length),
                                     in_pool ? static_cast<int>(key.size(1)) : 0,
                                     in_pool ? static_cast<int>(key.size(0)) : 0,
                                     each,
                                     key.stride(tokens),
                                     key.stride(tokens + 1),
                                     in_pool ? key.stride(0) : 0,
                                     static_cast<float>(scale)};
  D <= 64 ? launch_decode<64>(type, splits, arguments, stream_of(q))
          : launch_decode<128>(type, splits, arguments, stream_of(q));
  return merge(outs, lses);
}

// ---- blocks

struct Pool {
  int64_t tokens, token_units, block_units, blocks;
};

Pool check_pool(const char* name, const Tensor& pool) {
  STD_TORCH_CHECK(pool.dim() == 4 && pool.is_contiguous() && pool.numel() > 0, name,
                  ": pool: expected contiguous, non-empty [blocks, block_size, Hkv, D]");
  const int64_t bytes = pool.size(2) * pool.size(3) * pool.element_size();
  STD_TORCH_CHECK(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(pool.data_ptr()) % 16 == 0, name,
                  ": pool: expected tokens of a multiple of 16 bytes, found ", bytes);
  return {pool.size(0) * pool.size(1), bytes / 16, pool.size(1) * bytes / 16, pool.size(0)};
}

void check_indices(const char* name, const Tensor& x, const Tensor& pool) {
  check_device(name, x, pool);
  STD_TORCH_CHECK(x.dim() == 1 && x.is_contiguous() && x.scalar_type() == ScalarType::Long, name,
                  ": indices: expected contiguous int64 [N]");
}

unsigned copy_grid(int64_t units) {
  return static_cast<unsigned>(std::clamp<int64_t>((units + kCopyThreads - 1) / kCopyThreads, 1, 4096));
}

void append_tokens(Tensor pool, const Tensor& tokens, const Tensor& slots) {
  const Pool p = check_pool("append_tokens", pool);
  check_indices("append_tokens", slots, pool);
  check_device("append_tokens", tokens, pool);
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(0) == slots.numel() && tokens.size(1) == pool.size(2) &&
                      tokens.size(2) == pool.size(3) && tokens.scalar_type() == pool.scalar_type(),
                  "append_tokens: tokens: expected [N, Hkv, D] of the pool's dtype, one for each slot");
  const int64_t units = slots.numel() * p.token_units;
  if (units == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(pool.get_device_index());
  const Tensor from = torch::stable::contiguous(tokens);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(from.data_ptr()) % 16 == 0,
                  "append_tokens: tokens: expected to start at 16 bytes");
  copy_runs<true><<<copy_grid(units), kCopyThreads, 0, stream_of(pool)>>>(
      data<Unit>(pool), data<Unit>(from), data<int64_t>(slots), units, static_cast<int>(p.token_units), p.tokens);
  check_launch("append_tokens");
}

Tensor gather_tokens(const Tensor& pool, const Tensor& block_table, int64_t length) {
  const Pool p = check_pool("gather_tokens", pool);
  check_device("gather_tokens", block_table, pool);
  STD_TORCH_CHECK(block_table.dim() == 1 && block_table.is_contiguous() && block_table.scalar_type() == ScalarType::Int,
                  "gather_tokens: block_table: expected contiguous int32 [N]");
  STD_TORCH_CHECK(length >= 0 && length <= block_table.numel() * pool.size(1), "gather_tokens: length is ", length, " of ",
                  block_table.numel() * pool.size(1), " tokens");
  Tensor out = torch::stable::new_empty(pool, {length, pool.size(2), pool.size(3)});
  const int64_t units = length * p.token_units;
  if (units == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(pool.get_device_index());
  copy_runs<false><<<copy_grid(units), kCopyThreads, 0, stream_of(pool)>>>(
      data<Unit>(out), data<Unit>(pool), data<int>(block_table), units, static_cast<int>(p.block_units), p.blocks);
  check_launch("gather_tokens");
  return out;
}

void copy_blocks(Tensor pool, const Tensor& sources, const Tensor& targets) {
  const Pool p = check_pool("copy_blocks", pool);
  check_indices("copy_blocks", sources, pool);
  check_indices("copy_blocks", targets, pool);
  STD_TORCH_CHECK(sources.numel() == targets.numel(), "copy_blocks: ", sources.numel(), " sources, ", targets.numel(),
                  " targets");
  const int64_t units = sources.numel() * p.block_units;
  if (units == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(pool.get_device_index());
  copy_within<<<copy_grid(units), kCopyThreads, 0, stream_of(pool)>>>(
      data<Unit>(pool), data<int64_t>(sources), data<int64_t>(targets), units, static_cast<int>(p.block_units), p.blocks);
  check_launch("copy_blocks");
}

}  // namespace
}  // namespace opsdl

STABLE_TORCH_LIBRARY_IMPL(opsdl, CUDA, m) {
  m.impl("merge_states", TORCH_BOX(&opsdl::merge));
  m.impl("prefix_decode", TORCH_BOX(&opsdl::prefix_decode));
  m.impl("append_tokens", TORCH_BOX(&opsdl::append_tokens));
  m.impl("gather_tokens", TORCH_BOX(&opsdl::gather_tokens));
  m.impl("copy_blocks", TORCH_BOX(&opsdl::copy_blocks));
}
