"""What bench/gpu_check.py measures, stage after stage, and whether it passes."""

from __future__ import annotations

import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from bench import gpu_loss, gpu_prefix, gpu_report, results
from bench.gpu_claims import claim, failures
from bench.gpu_place import Place
from bench.results import Case
from opsdl import extension

OPERATORS = ("merge_states", "merge_states_backward", "prefix_decode", "append_tokens", "gather_tokens", "copy_blocks")


def loaded() -> list[Case]:
    """Whether the compiled operators are what a tensor on this GPU will reach."""
    state = extension.load_cuda()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [name for name in OPERATORS if state != "available" or not has(f"opsdl::{name}", "CUDA")]
    return [claim("the compiled operators are loaded", not missing, "" if not missing else f"{state}: {missing}")]


def loss_errors(place: Place) -> list[Case]:
    """Errors of the losses, counting the launches of our kernels meanwhile."""
    with gpu_loss.launches() as launched:
        cases = gpu_loss.accuracy(place)
    if place.dry:
        return cases
    idle = [name for name, count in launched.items() if count == 0]
    return [*cases, claim("every Triton kernel was launched", bool(launched) and not idle, ", ".join(idle))]


def stages(place: Place) -> dict[str, Callable[[], list[Case]]]:
    """What is done, in this order; each gives its cases."""
    on_gpu = {} if place.dry else {"loading": loaded}
    timed = {f"times of {shape}": lambda shape=shape: gpu_loss.timings(place, shape) for shape in place.loss_shapes}
    return {
        **on_gpu,
        "errors of the losses": lambda: loss_errors(place),
        "errors of shared prefixes": lambda: gpu_prefix.accuracy(place),
        **timed,
        "times of decoding": lambda: gpu_prefix.timings(place),
    }


def run(place: Place, out: Path, cases: list[Case]) -> int:
    """Run all stages, writing the results after each.

    Args:
        place: Where.
        out: The folder of the results.
        cases: What is known already; the results begin with it.

    Returns:
        The exit code: 0 if everything holds, else 1.
    """
    for name, stage in stages(place).items():
        print(f"gpu_check: {name}", flush=True)
        try:
            cases = cases + stage()
        except Exception as error:  # one broken stage must not cost the others, nor pass
            traceback.print_exc()
            cases = [
                *cases,
                claim(f"{name}: ran to its end", False, f"{type(error).__name__}: {error}".splitlines()[0]),
            ]
        result = results.measured("gpu_check", "python bench/gpu_check.py", {"driver": driver()}, cases)
        results.publish(result, gpu_report.report(result), out)  # kept when a later stage is cut off
    broken = failures(cases)
    print("\n".join(f"gpu_check: FAILED {line}" for line in broken) or "gpu_check: passed")
    return 1 if broken else 0


def driver() -> str:
    """The version of the GPU's driver, or what stands in its place."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
