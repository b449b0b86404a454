"""The fused losses beside their peers: time, peak memory, and errors against float64.

    python -m bench.loss            # the tables of the README, into bench/results/loss.{json,md,png}
    python -m bench.loss --shape 64,128,4096 --out DIR

Finished shapes are kept in loss.part.json: after an interruption the same command goes on there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import opsdl
from bench import harness, loss_cases, loss_report
from bench.harness import Say, Step
from bench.inputs import (
    DTYPES,
    NOISE,
    SHAPES,
    Inputs,
    LossAndGradients,
    Shape,
    hidden_truth,
    make_inputs,
    relative_error,
    truth,
)
from bench.loss_cases import QUICK_WAYS, TIMED_NOISE, WAYS, Differentiate
from bench.machine import machine_facts, versions
from bench.memory import peak_in_child
from bench.results import Case, Number, measured, publish

NAME = "loss"
QUICK_SHAPE = Shape(32, 64, 512)


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(NAME, __doc__)
    parser.add_argument("--shape", type=_shape, action="append", metavar="N,H,V", help="instead of the usual three")
    options = harness.parse(parser, arguments)
    try:
        run(options)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on with the shape that was cut off")


def run(options: argparse.Namespace) -> None:
    """Do what is not in the part file yet, then turn it into the results."""
    shapes = options.shape or ([QUICK_SHAPE] if options.quick else list(SHAPES))
    names = QUICK_WAYS if options.quick else tuple(WAYS)
    settings = {"rounds": harness.ROUNDS, "noise": TIMED_NOISE}
    conditions = {"machine": machine_facts(), "versions": versions(), "settings": settings, "ways": names}
    part = harness.Part(options.out / "loss.part.json", conditions)
    tasks = [
        (f"{shape} {dtype}", partial(speeds, shape, dtype, names, memory=not options.quick))
        for shape in shapes
        for dtype in DTYPES
    ]
    # Errors need the head's float64 gradient too, so they are measured on the first shape, with few tokens.
    small = Shape(min(128, shapes[0].N), shapes[0].H, shapes[0].V)
    tasks += [(f"errors {small} {dtype}", partial(errors, small, dtype, names)) for dtype in DTYPES]
    cases: list[Case] = []
    for index, (key, measure) in enumerate(tasks):
        say = harness.speaker(f"[{index + 1}/{len(tasks)}] {key}")
        cases += part.cases(key, partial(measure, say=say))
    result = measured(NAME, options.command, settings, cases)
    publish(result, loss_report.report(result), options.out)
    part.discard()


def speeds(shape: Shape, dtype: str, names: Sequence[str], *, memory: bool, say: Say) -> list[Case]:
    """Times, peak memory and the error of dHidden of all ways at one shape and dtype."""
    torch.compiler.reset()  # otherwise the second shape is compiled for any size, and slower
    inputs = make_inputs(shape, dtype, TIMED_NOISE)
    say("float64 truth")
    kl, grad_hidden_NH = hidden_truth(inputs)
    of = {"what": "speed", **conditions_of(shape, dtype)}
    steps: dict[str, Step] = {}
    cases = {name: warmed(name, inputs, grad_hidden_NH, of, steps, say) for name in names}
    # Two runs a turn, of which the second counts; what `warmed` ran was the warm-up.
    times = harness.time_in_turn(steps, warm_up=0, untimed=1, say=say)
    for name, rounds in times.items():
        numbers = cases[name].numbers
        numbers["time"] = Number.timed(rounds, "ms")
        numbers["ratio"] = Number.ratio(rounds, times["products"])
    facts = facts_of(inputs, float(kl), of)
    del inputs, grad_hidden_NH, steps  # leave the memory to the children
    for name in times if memory else ():
        say(f"memory: {name}")
        peak = peak_in_child(loss_cases.step_of, name, shape.N, shape.H, shape.V, dtype)
        if peak is not None:
            cases[name].numbers["memory"] = Number(peak, "bytes")
    return [facts, *cases.values()]


def warmed(
    name: str, inputs: Inputs, grad_hidden_NH: Tensor, of: dict[str, Any], steps: dict[str, Step], say: Say
) -> Case:
    """Run one way once: its case so far, and its step into `steps` if it works."""
    say(f"warm-up: {name}")
    way, of = WAYS[name], {**of, "kind": WAYS[name].kind}
    try:
        differentiate = way.make()
        result = differentiate(inputs)
    except Exception as error:  # one peer's failure must not cost the other cases
        return Case(name, way.label, of, {}, reason(error))
    steps[name] = partial(differentiate, inputs)
    if way.kind != "reverse KL":
        return Case(name, way.label, of, {})
    hidden_error = relative_error(result.grad_hidden_NH, grad_hidden_NH)
    return Case(name, way.label, of, {"hidden_error": Number(hidden_error, "1")})


def facts_of(inputs: Inputs, kl: float, of: dict[str, Any]) -> Case:
    """What the reader of a table of speeds must know of its inputs."""
    x = inputs.leaves()
    _, stats = opsdl.fused_reverse_kl(x.hidden_NH, x.weight_VH, x.teacher_NH, skip_tolerance="auto", return_stats=True)
    gradients = (x.hidden_NH.numel() + x.weight_VH.numel()) * x.hidden_NH.element_size()
    numbers = {
        "gradients": Number(gradients, "bytes"),
        "kl": Number(kl, "nats"),
        "skipped": Number(float(stats["skipped"].float().mean()), "1"),
    }
    return Case("inputs", "inputs", of, numbers)


def errors(shape: Shape, dtype: str, names: Sequence[str], *, say: Say) -> list[Case]:
    """Relative errors of dHidden, dHead and the mean KL, for KL from about 1 down to 1e-7."""
    torch.compiler.reset()
    made: dict[str, Differentiate] = {}
    for name in names:
        if WAYS[name].kind == "reverse KL":
            try:
                made[name] = WAYS[name].make()
            except ImportError:
                pass  # the tables of speed name it
    cases = []
    for noise in NOISE[dtype]:
        inputs = make_inputs(shape, dtype, noise)
        expected = truth(inputs)
        of = {"what": "errors", **conditions_of(shape, dtype), "noise": noise}
        say(f"errors at KL {expected.loss:.1e}")
        cases.append(Case("inputs", "inputs", of, {"kl": Number(float(expected.loss), "nats")}))
        cases += [errors_of(name, differentiate, inputs, expected, of) for name, differentiate in made.items()]
    return cases


def errors_of(
    name: str, differentiate: Differentiate, inputs: Inputs, expected: LossAndGradients, of: dict[str, Any]
) -> Case:
    try:
        result = differentiate(inputs)
    except Exception as error:
        return Case(name, WAYS[name].label, of, {}, reason(error))
    pairs = zip(("kl_error", "hidden_error", "head_error"), result, expected, strict=True)
    numbers = {what: Number(relative_error(x, y), "1") for what, x, y in pairs}
    return Case(name, WAYS[name].label, of, numbers)


def conditions_of(shape: Shape, dtype: str) -> dict[str, Any]:
    return {"N": shape.N, "H": shape.H, "V": shape.V, "dtype": dtype}


def reason(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _shape(text: str) -> Shape:
    return Shape(*map(int, text.split(",")))


if __name__ == "__main__":
    main()
