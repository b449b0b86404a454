"""The kernels of csrc/cuda compiled for the host and run under sanitizers, against float64; and seeded faults."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.gpu.prefix_cases import DECODE_CASES, SOURCES, DecodeCase, check_merged, missing, states

pytestmark = pytest.mark.skipif(missing("g++") is not None, reason=str(missing("g++")))
HERE = Path(__file__).parent
TOOLS = HERE.parents[1] / "tools"
SANITIZE = {
    "address and undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
    "none": [],
}


def build(folder, sanitizer, sources=SOURCES, *flags):
    program = folder / "host"
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-g",
        f"-I{TOOLS}",
        f"-I{sources}",
        *SANITIZE[sanitizer],
        *flags,
    ]
    subprocess.run([*command, str(HERE / "cuda" / "host.cpp"), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module", params=["address and undefined", "thread"])
def program(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("host"), request.param)


def run(program, folder, tensors, *arguments):
    """Returns the process; raises no error."""
    for name, x in tensors.items():
        x.contiguous().view(torch.uint8).numpy().tofile(folder / name)
    command = [str(program), str(folder), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def result(folder, name, dtype=np.float32):
    return torch.from_numpy(np.fromfile(folder / name, dtype))


def decode(program, folder, case, seed=0):
    tensors = {name: getattr(case, name) for name in ("query", "key", "value", "table")}
    name = str(case.dtype).removeprefix("torch.")
    numbers = [case.width, seed, *case.sizes, *case.strides]
    done = run(program, folder, tensors, "decode", name, *numbers)
    assert done.returncode == 0, done.stderr[:2000]
    case.check(result(folder, "out"), result(folder, "lse"))


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decode(case, program, tmp_path):
    decode(program, tmp_path, case, seed=7)


def test_merge(program, tmp_path):
    for S, rows, D in ((1, 5, 64), (3, 130, 40), (40, 9, 128)):
        given = states(S, rows, D)
        done = run(program, tmp_path, dict(zip(("outs", "lses"), given, strict=True)), "merge", 3, S, rows, D)
        assert done.returncode == 0, done.stderr[:2000]
        check_merged(given, result(tmp_path, "out").view(rows, D), result(tmp_path, "lse"))


def test_blocks_of_a_pool(program, tmp_path):
    """5 blocks of 4 tokens of 3 units of 16 bytes."""
    pool, tokens = torch.randn(20, 12), torch.randn(6, 12)
    slots, blocks = torch.tensor([19, 0, 7, 8, 3, 12]), torch.tensor([4, 0, 2])
    done = run(program, tmp_path, {"pool": pool, "tokens": tokens, "indices": slots}, "append", 1, 6, 3, 20)
    assert done.returncode == 0, done.stderr[:2000]
    expected = pool.clone()
    expected[slots] = tokens
    assert torch.equal(result(tmp_path, "pool").view(20, 12), expected)
    gathered = {"pool": expected, "tokens": torch.zeros(12, 12), "indices": blocks}
    assert run(program, tmp_path, gathered, "gather", 1, 3, 12, 5).returncode == 0
    assert torch.equal(result(tmp_path, "tokens").view(3, 48), expected.view(5, 48)[blocks])
    copied = {"pool": expected, "tokens": tokens, "indices": torch.tensor([4, 2, 1, 3])}
    assert run(program, tmp_path, copied, "copy", 1, 2, 12, 5).returncode == 0
    moved = expected.view(5, 48).clone()
    moved[[1, 3]] = moved[[4, 2]]
    assert torch.equal(result(tmp_path, "pool").view(5, 48), moved)
    outside = run(program, tmp_path, {**copied, "indices": torch.tensor([4, 2, 1, 5])}, "copy", 1, 2, 12, 5)
    assert outside.returncode != 0 and "trap" in outside.stderr


FAULTS = {  # (file, right, wrong)
    "the mask of keys beyond the last": (
        "decode.cuh", "s = n * 8 + lane % 4 * 2 + i < visible ? s", "s = true ? s",
    ),
    "fetching beyond the last key": ("decode.cuh", "start + row < end && column < x.D", "column < x.D"),
    "rescaling of the old sum": ("decode.cuh", "state.sum[half] *= shrink;", ""),
    "the group's head": ("decode.cuh", "blockIdx.y * group + q % group", "blockIdx.y * group"),
    "the block table": ("decode.cuh", "x.table[t / x.block_size]", "x.table[(t + 1) / x.block_size]"),
    "the weight of an empty part": ("merge.cuh", "return isinf(lse) ? 0.f :", "return"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_source_is_noticed(fault, tmp_path):
    file, right, wrong = FAULTS[fault]
    for path in SOURCES.glob("*.cuh"):
        text = path.read_text()
        if path.name == file:
            assert right in text, "the fault is seeded nowhere: the kernel has changed"
            text = text.replace(right, wrong)
        (tmp_path / path.name).write_text(text)
    with pytest.raises(AssertionError):
        program = build(tmp_path, "address and undefined", tmp_path)
        decode(program, tmp_path, DecodeCase(torch.bfloat16, 3, 4, 2, 64, 150, 16, 128))
        test_merge(program, tmp_path)


def test_missing_barriers_are_noticed(tmp_path):
    program = build(tmp_path, "none", SOURCES, "-DNO_BARRIERS")
    with pytest.raises(AssertionError):
        decode(program, tmp_path, DecodeCase(torch.float32, 5, 4, 2, 64, 150, 0, 64), seed=5)
