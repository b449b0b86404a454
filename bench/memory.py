"""Peak memory of one step, in a process that does nothing else. Linux only.

python -m bench.memory MODULE:FUNCTION ARGUMENTS WARM_UP THREADS      ->  bytes as the last line
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from bench.harness import Step

ROOT = Path(__file__).parent.parent


def peak_in_child(make: Callable[..., Step], *arguments: object, warm_up: int = 2) -> int | None:
    """Peak bytes of a step in a fresh process, above what that held before the step.

    It includes the results of the step, and leaves out its inputs and whatever it keeps from run to run.

    Args:
        make: A function at the top of an importable module, which makes the step in the child.
        arguments: Its arguments, as JSON has them.
        warm_up: How often the step runs before: two runs load libraries and compile.

    Returns:
        The bytes, or None when the child died (it had too little memory).
    """
    where = f"{_module(make)}:{make.__qualname__}"
    values = [where, json.dumps(arguments), str(warm_up), str(torch.get_num_threads())]
    command = [sys.executable, "-m", "bench.memory", *values]
    child = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return int(child.stdout.splitlines()[-1]) if child.returncode == 0 else None


def peak_bytes(step: Step, warm_up: int) -> int:
    """Peak bytes of a step in this process."""
    for _ in range(warm_up):
        step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory that the C library keeps would hide a part of the peak
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _module(make: Callable[..., Step]) -> str:
    """The name under which a child can import the module of `make`; that of the main module is its file's."""
    if make.__module__ != "__main__":
        return make.__module__
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "run benches as modules: python -m bench.NAME"
    return spec.name


def main(where: str, arguments: str, warm_up: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    module, _, function = where.partition(":")
    step: Step = getattr(import_module(module), function)(*json.loads(arguments))
    print(peak_bytes(step, int(warm_up)))


if __name__ == "__main__":
    main(*sys.argv[1:])
