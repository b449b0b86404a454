"""The measurements of one shape and dtype: times round-robin, peak memory, error against float64."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import opsdl
from bench.cases import CASES, Step
from bench.inputs import NOISE, Inputs, Result, Shape, make_inputs, relative_error, truth

ROUNDS = 5
TIMED_NOISE = 0.06  # KL about 1e-2; no case but "skip" depends on it
ROOT = Path(__file__).parent.parent

Say = Callable[[str], None]


def measure(shape: Shape, dtype: str, threads: int, say: Say) -> dict[str, Any]:
    """All cases at one shape and dtype; a case that is missing or fails has an "error" in place of its numbers."""
    torch.compiler.reset()  # otherwise the second shape is compiled for any size, and slower
    inputs = make_inputs(shape, dtype, TIMED_NOISE)
    say("float64 truth")
    expected = truth(inputs, weight_gradient=False)
    rows, steps = warm_up(inputs, expected, say)
    for name, milliseconds in round_robin(steps, inputs, say).items():
        rows[name]["milliseconds"] = milliseconds
    facts = {
        "shape": [shape.N, shape.H, shape.V],
        "dtype": dtype,
        "kl": float(expected.loss),
        "gradient_bytes": (shape.N + shape.V) * shape.H * inputs.hidden_NH.element_size(),
        "skipped_tokens": skipped_share(inputs) if "opsdl-skip" in steps else None,
    }
    del inputs, expected  # leave the memory to the children
    for name in steps:
        say(f"memory: {name}")
        rows[name]["extra_bytes"] = extra_bytes(name, shape, dtype, threads)
    return {**facts, "cases": rows}


def warm_up(inputs: Inputs, expected: Result, say: Say) -> tuple[dict[str, dict[str, Any]], dict[str, Step]]:
    """Run every case once. Returns what is known of each case so far, and the steps of those that work."""
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name, case in CASES.items():
        say(f"warm-up: {name}")
        try:
            step = case.make()
            result = step(inputs)
        except ImportError as error:
            rows[name] = {"error": f"not installed: {error}"}
        except Exception as error:  # one peer's failure must not cost the other cases
            rows[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        else:
            steps[name], rows[name] = step, {}
            if case.kind == "reverse KL":
                rows[name]["hidden_error"] = relative_error(result.grad_hidden_NH, expected.grad_hidden_NH)
    return rows, steps


def round_robin(steps: dict[str, Step], inputs: Inputs, say: Say) -> dict[str, list[float]]:
    """Milliseconds of every round. In a round each case has its turn, so that a noisy minute hits all of them.

    A turn is two runs, of which the second counts: the first pays for memory that the case before it gave back to the
    system, which on a virtual machine can take as long as the products.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(ROUNDS):
        for name, step in steps.items():
            # Also, imports of a later peer change global state that compiled code depends on, and it recompiles.
            step(inputs)
            start = perf_counter()
            result = step(inputs)
            times[name].append((perf_counter() - start) * 1000)
            del result
        say(f"round {index + 1} of {ROUNDS}: " + ", ".join(f"{name} {times[name][-1]:.0f} ms" for name in steps))
    return times


def skipped_share(inputs: Inputs) -> float:
    """Share of the tokens that skip_tolerance "auto" leaves out of the backward products."""
    x = inputs.leaves()
    _, stats = opsdl.fused_reverse_kl(x.hidden_NH, x.weight_VH, x.teacher_NH, skip_tolerance="auto", return_stats=True)
    return float(stats["skipped"].float().mean())


def extra_bytes(name: str, shape: Shape, dtype: str, threads: int) -> int | None:
    """Peak memory of the case in a process of its own; None when that process died (it had too little memory)."""
    arguments = [name, shape.N, shape.H, shape.V, dtype, threads]
    child = subprocess.run(
        [sys.executable, "-m", "bench.memory", *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return json.loads(child.stdout.splitlines()[-1])["extra_bytes"] if child.returncode == 0 else None


def measure_accuracy(shape: Shape, dtype: str, say: Say) -> dict[str, Any]:
    """Relative errors of dHidden, dHead and the mean KL, for KL from about 1 down to 1e-7."""
    torch.compiler.reset()
    steps, levels = {}, []
    for name, case in CASES.items():
        if case.kind == "reverse KL":
            try:
                steps[name] = case.make()
            except ImportError:
                pass  # the tables of speed name it
    for noise in NOISE[dtype]:
        inputs = make_inputs(shape, dtype, noise)
        expected = truth(inputs, weight_gradient=True)
        say(f"accuracy at KL {expected.loss:.1e}")
        rows = {name: errors(step, inputs, expected) for name, step in steps.items()}
        levels.append({"noise": noise, "kl": float(expected.loss), "cases": rows})
    return {"shape": [shape.N, shape.H, shape.V], "dtype": dtype, "levels": levels}


def errors(step: Step, inputs: Inputs, expected: Result) -> dict[str, Any]:
    try:
        result = step(inputs)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    names = ("loss", "hidden", "weight")
    return {name: relative_error(x, y) for name, x, y in zip(names, result, expected, strict=True)}
