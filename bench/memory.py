"""Peak extra memory of one case, in a process that does nothing else.

    python -m bench.memory CASE N H V DTYPE THREADS      ->  {"extra_bytes": ...} as the last line

Two steps load libraries and compile; the peak is that of the third, above what the process held before it.
It includes dHidden and dHead, and leaves out the inputs and whatever a case keeps from step to step. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from bench.cases import CASES
from bench.inputs import Shape, make_inputs


def extra_bytes(case: str, shape: Shape, dtype: str) -> int:
    step, inputs = CASES[case].make(), make_inputs(shape, dtype, noise=0.06)
    for _ in range(2):  # code compiled at the first may be compiled again at the second
        step(inputs)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory that the C library keeps would hide a part of the peak
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    step(inputs)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main(case: str, n: str, h: str, v: str, dtype: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    print(json.dumps({"extra_bytes": extra_bytes(case, Shape(int(n), int(h), int(v)), dtype)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
