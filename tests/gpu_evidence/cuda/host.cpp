// The kernels of csrc/cuda on the host, for sanitizers: reads raw tensors from a folder and writes what the kernels give.
//   host FOLDER decode TYPE WIDTH SEED R Hq Hkv D length block_size blocks keys_per_split token_stride head_stride block_stride
//   host FOLDER merge SEED S rows D
//   host FOLDER append|gather|copy SEED count units limit
#define SHIM_IMPL
#include "cuda_shim.h"
#ifdef NO_BARRIERS
#define __syncthreads() ((void)0)
#endif

#include <fstream>
#include <iterator>
#include <string>

#include "blocks.cuh"
#include "decode.cuh"
#include "merge.cuh"

using namespace opsdl;

static std::string folder;

// A tensor of its exact size on the heap, so that a sanitizer notices what lies outside.
template <class T>
std::vector<T> read(const char* name) {
  std::ifstream file(folder + "/" + name, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<T> out(bytes.size() / sizeof(T));
  if (!out.empty()) std::memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
  return out;
}

template <class T>
void write(const char* name, const std::vector<T>& x) {
  std::ofstream(folder + "/" + name, std::ios::binary).write(reinterpret_cast<const char*>(x.data()), x.size() * sizeof(T));
}

struct Numbers {
  char** next;
  int operator()() { return std::atoi(*next++); }
};

template <class Kernel>
void run_decode(Kernel kernel, size_t shared, int queries_each, const DecodeArguments& x, int seed) {
  const int queries = x.R * (x.Hq / x.Hkv), splits = (x.length + x.keys_per_split - 1) / x.keys_per_split;
  const dim3 grid(splits, x.Hkv, (queries + queries_each - 1) / queries_each);
  shim::launch(grid, dim3(kDecodeThreads), shared, [&] { kernel(x); }, seed);
}

template <int kWidth>
void run_decode(const std::string& type, const DecodeArguments& x, int seed) {
  if (type == "bfloat16") run_decode(decode_half<Bf16, kWidth>, sizeof(HalfTile<kWidth>), 64, x, seed);
  if (type == "float16") run_decode(decode_half<Fp16, kWidth>, sizeof(HalfTile<kWidth>), 64, x, seed);
  if (type == "float32") run_decode(decode_float<kWidth>, sizeof(FloatTile<kWidth>), 32, x, seed);
}

void decode(char** arguments) {
  const std::string type = arguments[0];
  Numbers next{arguments + 1};
  const int width = next(), seed = next();
  // 16-byte aligned like a GPU's allocations.
  const auto query = read<Unit>("query"), key = read<Unit>("key"), value = read<Unit>("value");
  const auto table = read<int>("table");
  DecodeArguments x{query.data(), key.data(), value.data(), table.empty() ? nullptr : table.data()};
  for (int* size : {&x.R, &x.Hq, &x.Hkv, &x.D, &x.length, &x.block_size, &x.blocks, &x.keys_per_split}) *size = next();
  for (long long* stride : {&x.token_stride, &x.head_stride, &x.block_stride}) *stride = next();
  x.scale = 0.3f;
  const int splits = (x.length + x.keys_per_split - 1) / x.keys_per_split;
  std::vector<float> out(static_cast<size_t>(splits) * x.R * x.Hq * x.D), lse(static_cast<size_t>(splits) * x.R * x.Hq);
  x.out = out.data(), x.lse = lse.data();
  width == 64 ? run_decode<64>(type, x, seed) : run_decode<128>(type, x, seed);
  write("out", out), write("lse", lse);
}

void merge(char** arguments) {
  Numbers next{arguments};
  const int seed = next(), S = next(), rows = next(), D = next();
  const auto outs = read<float>("outs"), lses = read<float>("lses");
  std::vector<float> out(static_cast<size_t>(rows) * D), lse(rows);
  const dim3 grid((rows + 3) / 4), block(kMergeThreads);
  shim::launch(grid, block, 0, [&] { merge_states(outs.data(), lses.data(), out.data(), lse.data(), S, rows, D); }, seed);
  write("out", out), write("lse", lse);
}

void in_blocks(const std::string& what, char** arguments) {
  Numbers next{arguments};
  const int seed = next(), count = next(), units = next(), limit = next();
  auto pool = read<Unit>("pool"), tokens = read<Unit>("tokens");
  const auto indices = read<long long>("indices");
  const long long total = static_cast<long long>(count) * units;
  shim::launch(dim3(2), dim3(kCopyThreads), 0, [&] {
    if (what == "append") copy_runs<true>(pool.data(), tokens.data(), indices.data(), total, units, limit);
    if (what == "gather") copy_runs<false>(tokens.data(), pool.data(), indices.data(), total, units, limit);
    if (what == "copy") copy_within(pool.data(), indices.data(), indices.data() + count, total, units, limit);
  }, seed);
  write("pool", pool), write("tokens", tokens);
}

int main(int, char** argv) {
  folder = argv[1];
  const std::string what = argv[2];
  try {
    if (what == "decode") decode(argv + 3);
    else if (what == "merge") merge(argv + 3);
    else in_blocks(what, argv + 3);
  } catch (const std::exception& error) {
    fprintf(stderr, "ERROR %s\n", error.what());
    return 2;
  }
}
