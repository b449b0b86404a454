"""The shim's built-ins, and the bugs that it must notice."""

import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PROGRAM = """
#define SHIM_IMPL
#include "cuda_shim.h"
template <int CASE> __global__ void kernel(int* out) {
  const int t = threadIdx.x;
  if constexpr (CASE == 0) { if (t < 32) __syncthreads(); }
  if constexpr (CASE == 1) { if (t < 32) __syncthreads(); else if (t % 2) __syncwarp(); }
  if constexpr (CASE == 2) { if (t != 3) __shfl_xor_sync(~0u, 1, 1); }
  if constexpr (CASE == 3) { out[t] = std::isnan(*(float*)shim::dynamic_shared()); }
  if constexpr (CASE == 4) { out[t] = __shfl_down_sync(~0u, t, 8, 16); }
  if constexpr (CASE == 5) { out[t] = __ballot_sync(~0u, t == 33) == (t < 32 ? 0u : 2u); }
}
template <int CASE> void run() {
  int out[64] = {};
  try { shim::launch(dim3(1), dim3(64), 64, [&] { kernel<CASE>(out); }); }
  catch (const std::exception& error) { printf("%s\\n", error.what()); return; }
  for (int v : out) printf("%d ", v);
  printf("\\n");
}
int main() { run<0>(); run<1>(); run<2>(); run<3>(); run<4>(); run<5>(); }
"""


def build(folder, source, *flags):
    program = folder / "program"
    command = ["g++", "-std=c++20", "-O1", f"-I{TOOLS}", *flags, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def run(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


def test_built_ins(tmp_path):
    source = tmp_path / "built_ins.cpp"
    source.write_text(PROGRAM)
    lines = run(build(tmp_path, source)).stdout.splitlines()
    shifted = "".join(f"{t + 8 if t % 16 < 8 else t} " for t in range(64))
    for line, expected in zip(
        lines, ["barrier divergence", "deadlock", "deadlock", "1 " * 64, shifted, "1 " * 64], strict=True
    ):
        assert expected in line
