"""The PTX that nvcc makes of csrc/cuda, executed: right results, no race, nothing outside, and what it reads."""

import struct
from functools import cache

import pytest
import torch

from tests.support.gpu.prefix_cases import DECODE_CASES, SCALE, SOURCES, DecodeCase, check_merged, missing, states
from tools import ptxsim
from tools.ptxsim import mutation
from tools.ptxsim.launch import host_bytes
from tools.ptxsim.machine import Machine
from tools.ptxsim.parser import Kernel, Module

pytestmark = pytest.mark.skipif(missing("nvcc") is not None, reason=str(missing("nvcc")))
ARCHS = ["sm_80", "sm_90"]
SHARED = {64: 4 * 64 * 72 * 2, 128: 4 * 64 * 136 * 2}  # HalfTile
SHARED_FLOAT = {64: (2 * 32 * 68 + 32 * 64) * 4, 128: (2 * 32 * 132 + 32 * 128) * 4}  # FloatTile


@cache
def ptx(arch):
    """Of the kernels that are templates, as the launchers in operators.cu use them."""
    return ptxsim.compile_cuda(
        f"""
#include "{SOURCES}/blocks.cuh"
#include "{SOURCES}/decode.cuh"
#include "{SOURCES}/merge.cuh"
namespace opsdl {{
template __global__ void decode_half<Bf16, 64>(DecodeArguments);
template __global__ void decode_half<Bf16, 128>(DecodeArguments);
template __global__ void decode_half<Fp16, 64>(DecodeArguments);
template __global__ void decode_float<64>(DecodeArguments);
template __global__ void decode_float<128>(DecodeArguments);
template __global__ void copy_runs<true>(Unit*, const Unit*, const long long*, long long, int, long long);
template __global__ void copy_runs<false>(Unit*, const Unit*, const int*, long long, int, long long);
}}
""",
        arch,
    )


def decode(text, case, count_traffic=False):
    machine = Machine(count_traffic)
    half = case.dtype != torch.float32
    kind = {torch.bfloat16: "11decode_halfINS_4Bf16E", torch.float16: "11decode_halfINS_4Fp16E"}
    entry = f"{kind.get(case.dtype, '12decode_floatI')}Li{case.width}E"
    out = torch.full((case.splits, *case.query.shape), torch.nan)
    lse = torch.full(out.shape[:3], torch.nan)
    tensors = [case.query, case.key, case.value, case.table, out, lse]
    pointers = [machine.register(host_bytes(x), name) if x.numel() else 0 for x, name in zip(
        tensors, ("query", "key", "value", "table", "out", "lse"), strict=True)]  # fmt: skip
    arguments = struct.pack("<6Q8i3qf4x", *pointers, *case.sizes, *case.strides, SCALE)
    queries = case.R * (case.Hq // case.Hkv)
    grid = (case.splits, case.Hkv, -(-queries // (64 if half else 32)))
    shared = (SHARED if half else SHARED_FLOAT)[case.width]
    report = machine.launch(Kernel(Module(text), entry), grid, [arguments], 128, shared)
    case.check(out, lse)
    return report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decode(case, arch):
    report = decode(ptx(arch), case)
    if case.dtype != torch.float32:
        assert any("mma.sync" in opcode for opcode in report.opcodes)
        assert any("cp.async" in opcode for opcode in report.opcodes)


@pytest.mark.parametrize("arch", ARCHS)
def test_merge(arch):
    S, rows, D = 3, 21, 64
    outs, lses = states(S, rows, D)
    out, lse = torch.full((rows, D), torch.nan), torch.full((rows,), torch.nan)
    ptxsim.run_ptx(ptx(arch), (-(-rows // 4),), 128, [outs, lses, out, lse, S, rows, D], "12merge_statesEPKf")
    check_merged((outs, lses), out, lse)


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_of_a_pool(arch):
    """5 blocks of 4 tokens of 3 units of 16 bytes, moved 16 bytes at a time."""
    pool, tokens = torch.randn(20, 12), torch.randn(6, 12)
    slots, blocks = torch.tensor([19, 0, 7, 8, 3, 12]), torch.tensor([4, 0, 2], dtype=torch.int32)
    expected, gathered = pool.clone(), torch.zeros(3, 48)
    expected[slots] = tokens
    report = ptxsim.run_ptx(
        ptx(arch), (1,), 256, [pool, tokens, slots, 18, 3, 20], "copy_runsILb1E", count_traffic=True
    )
    assert torch.equal(pool, expected)
    assert report.traffic["global.st"].bytes == 16 * 18 and report.traffic["global.st"].requests == 1
    ptxsim.run_ptx(ptx(arch), (1,), 256, [gathered, pool, blocks, 36, 12, 5], "copy_runsILb0E")
    assert torch.equal(gathered, expected.view(5, 48)[blocks.long()])


@pytest.mark.parametrize("case", [
    DecodeCase(torch.bfloat16, 8, 8, 1, 64, 256, 0, 128), DecodeCase(torch.bfloat16, 8, 4, 1, 128, 128, 16, 64),
], ids=str)  # fmt: skip
def test_traffic_and_bank_conflicts(case):
    """Up to 64 queries: keys and values are read once, in whole sectors; shared memory without a bank conflict."""
    report = decode(ptx("sm_80"), case, count_traffic=True)
    copies = report.traffic["global.cp_async"]
    once = 2 * case.length * case.Hkv * case.D * 2
    assert 32 * copies.sectors <= 1.1 * once, f"{32 * copies.sectors / once:.2f} reads of the keys and values"
    assert copies.efficiency == 1
    for name in ("shared.ldmatrix", "shared.cp_async"):
        assert report.traffic[name].requests and not report.traffic[name].bank_conflicts


@pytest.mark.parametrize("what, least", [("bar.sync", 1.0), ("cp.async.wait_group", 1.0)], ids=["barriers", "waits"])
def test_dropped_synchronisation_is_noticed(what, least):
    case = DecodeCase(torch.bfloat16, 8, 8, 1, 64, 192, 0, 192)
    text = ptx("sm_80")
    start = text.index(".entry", text.index("11decode_halfINS_4Bf16ELi64E") - 60)
    kernel = text[start : text.index("\n}", start)]
    caught = []
    for mutant in list(mutation.deletions(kernel, mutation.SYNCHRONISATION[what]))[:4]:
        try:
            decode(text.replace(kernel, mutant), case)
            caught.append(False)
        except (ptxsim.PtxError, AssertionError):
            caught.append(True)
    assert caught and sum(caught) >= least * len(caught), caught


def test_a_stride_that_conflicts_is_noticed():
    case = DecodeCase(torch.bfloat16, 8, 8, 1, 64, 64, 0, 64)
    right = (SOURCES / "decode.cuh").read_text()
    wrong = right.replace("kStride = kWidth + 8;", "kStride = kWidth;")
    assert wrong != right, "the fault is seeded nowhere: the kernel has changed"
    source = wrong.replace('#include "platform.cuh"', f'#include "{SOURCES}/platform.cuh"').replace("#pragma once", "")
    source += "namespace opsdl {\ntemplate __global__ void decode_half<Bf16, 64>(DecodeArguments);\n}\n"
    report = decode(ptxsim.compile_cuda(source, "sm_80"), case, count_traffic=True)
    assert report.traffic["shared.ldmatrix"].bank_conflicts
