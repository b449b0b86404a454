"""In a process of its own: TRITON_INTERPRET must be set before Triton is imported, and excludes compiling."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

CHECKS = """
from tools import bf16_interpreter
bf16_interpreter.install()
bf16_interpreter.install()
import torch, triton, triton.language as tl

@triton.jit
def cast(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))

@triton.jit
def dot(a, b, out, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))

@triton.jit
def add(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i) + tl.load(x + i))

@triton.jit
def total(x, out, n: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, n)), 0))

torch.manual_seed(0)
x = torch.randn(1024)
x[:4] = torch.tensor([float("inf"), -float("inf"), 1e-40, 3.4e38])
for source in (x, x.half(), x[4:].to(torch.int32).repeat(2)[:1024]):
    out = torch.zeros(1024, dtype=torch.bfloat16)
    cast[(1,)](source, out, 1024)
    assert torch.equal(out, source.bfloat16()), source.dtype
back = torch.zeros(1024)
cast[(1,)](x.bfloat16(), back, 1024)
assert torch.equal(back, x.bfloat16().float())
a, b, product = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16(), torch.zeros(32, 32)
dot[(1,)](a, b, product, 32)
torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
for kernel in (add, total):
    try:
        kernel[(1,)](x.bfloat16(), torch.zeros(1024, dtype=torch.bfloat16), 1024)
    except Exception as error:
        assert "bit patterns" in str(error) + str(error.__cause__), error
    else:
        raise AssertionError("bf16 arithmetic went unnoticed")
print("all good")
"""


def run(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.fixture
def as_file(tmp_path):
    """Triton needs the kernels' source in a file."""

    def write(code):
        path = tmp_path / "checks.py"
        path.write_text(code)
        return f"import runpy; runpy.run_path({str(path)!r})"

    return write


def test_casts_dot_and_refusals(as_file):
    result = run(as_file(CHECKS), TRITON_INTERPRET=None)
    assert "all good" in result.stdout, result.stdout + result.stderr


def test_install_after_triton_was_imported_is_refused():
    result = run("import triton; from tools import bf16_interpreter; bf16_interpreter.install()", TRITON_INTERPRET=None)
    assert "before Triton is first imported" in result.stderr
