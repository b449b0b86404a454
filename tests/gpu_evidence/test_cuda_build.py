"""csrc/cuda as `pip install` builds it: what it takes of each GPU, and that torch for CPUs loads it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from opsdl import extension
from opsdl.prefix.attention import operators  # noqa: F401  the schemas
from tests.support.gpu.prefix_cases import missing

LIBRARY = Path(extension.__file__).with_name("_cuda.so")
WHY = f"csrc/cuda is not built: {missing('nvcc') or 'see the set-up'}"
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason=WHY)
OPERATORS = ("merge_states", "prefix_decode", "append_tokens", "gather_tokens", "copy_blocks")
REGISTERS = {"decode_half": 224, "decode_float": 255, "merge_states": 48, "copy": 40}  # of a thread, at most


def test_a_cpu_build_of_torch_loads_it():
    assert extension.load_cuda() == "available"
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"opsdl::{name}", "CUDA"), name


def test_flash_attention_is_registered_for_training():
    for name in ("attend", "attend_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"opsdl::{name}", "CUDA"), name


def resources():
    """Return {(architecture, kernel): (registers, bytes of stack)}."""
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    dump = own if own.exists() else shutil.which("cuobjdump")
    if not dump:
        pytest.skip("no cuobjdump here")
    text = subprocess.run([dump, "--dump-resource-usage", LIBRARY], capture_output=True, text=True, check=True).stdout
    found, arch = {}, None
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        if match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found[arch, name] = int(match[1]), int(match[2])
    return found


def test_every_architecture_has_every_kernel_within_budget():
    found = resources()
    assert {arch for arch, _ in found} >= {"sm_80", "sm_90", "sm_100"}
    for (arch, name), (registers, stack) in found.items():
        limit = next((most for part, most in REGISTERS.items() if part in name), None)
        assert limit is not None, f"{name}: a kernel without a budget"
        assert registers <= limit and stack == 0, f"{arch} {name}: {registers} registers, {stack} bytes of stack"
    kernels = {arch: {name for a, name in found if a == arch} for arch, _ in found}
    assert len(set(map(frozenset, kernels.values()))) == 1
