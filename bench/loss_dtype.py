"""What the operands of the loss in bf16 cost and gain in a training step: its time, and the gradient of the weights.

    python -m bench.loss_dtype recipes/smollm2-kjv.yaml model.compute_dtype=float32 prompts_per_step=4

One batch of rollouts is sampled; then the student's forward, the loss and the backward run with float32 and with bf16
operands in the loss, in turn. The gradients are compared with those of float32 operands.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench import harness
from bench.results import Case, Number, Result, measured, origin, publish
from bench.tables import Report, Table, fixed, percent

if TYPE_CHECKING:  # so that bench.report, which measures nothing, starts without transformers
    from opsdl.training.groups import Rollout
    from opsdl.training.loop import Loop

NAME = "loss_dtype"
DTYPES = (torch.float32, torch.bfloat16)


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(NAME, __doc__)
    parser.add_argument("recipe", help="the YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="replaces a value of the recipe")
    options = harness.parse(parser, arguments)
    with tempfile.TemporaryDirectory() as folder:
        loop = make_loop(options.recipe, [*options.overrides, f"run_dir={folder}/run"])
        rollouts = loop.engine.generate(loop.prompts.batch(0), loop.config.rollout, loop.seed())
        rollouts = [replace(rollout, prefix=None) for rollout in rollouts]
        gradients = {dtype: gradient(loop, rollouts, dtype) for dtype in DTYPES}
        steps: dict[str, harness.Step] = {str(dtype): partial(gradient, loop, rollouts, dtype) for dtype in DTYPES}
        times = harness.time_in_turn(steps, rounds=2 if options.quick else harness.ROUNDS, say=harness.speaker(NAME))
    bar = times[str(torch.float32)]
    cases = [
        Case(
            str(dtype),
            str(dtype).removeprefix("torch."),
            {"what": "dtype"},
            {
                "time": Number.timed([x / 1e3 for x in times[str(dtype)]], "s"),
                "ratio": Number.ratio(times[str(dtype)], bar),
                "difference": Number(relative(gradients[dtype], gradients[torch.float32]), "1"),
            },
        )
        for dtype in DTYPES
    ]
    tokens = loop.objective.count(rollouts)
    settings = {"source": options.recipe, "overrides": options.overrides, "rounds": len(bar), "tokens": tokens}
    result = measured(NAME, options.command, settings, cases)
    publish(result, report(result), options.out)


def make_loop(recipe: str, overrides: list[str]) -> Loop:
    from opsdl.models import load_model, load_tokenizer
    from opsdl.training import run
    from opsdl.training.recipe import load_recipe
    from opsdl.training.rundir import RunDir

    config = load_recipe(recipe, overrides)
    source = config.model.name, config.model.gguf_file
    tokenizer, model = load_tokenizer(*source), load_model(*source)
    folder = RunDir(config)
    folder.create()
    return run.make_loop(config, folder, model, tokenizer, run.make_prompts(config, tokenizer, model))


def gradient(loop: Loop, rollouts: Sequence[Rollout], dtype: torch.dtype) -> list[Tensor]:
    """The gradient of every weight for the mean loss of the rollouts; they share a long context, or none do."""
    loop.student.loss_dtype = dtype
    out = loop.objective.loss(loop.student, loop.teacher, rollouts)
    parameters = list(loop.student.model.parameters())
    found = torch.autograd.grad(out.total / loop.objective.count(rollouts), parameters, allow_unused=True)
    return [x for x in found if x is not None]


@torch.no_grad()
def relative(gradients: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative norm of the difference of two gradients over all weights."""
    apart = sum(float((x - y).double().square().sum()) for x, y in zip(gradients, expected, strict=True))
    return (apart / sum(float(y.double().square().sum()) for y in expected)) ** 0.5


def report(result: Result) -> Report:
    rows = [
        [case.label, fixed(case.value("time")), fixed(case.value("ratio")), percent(case.value("difference"), 2)]
        for case in result.select(what="dtype")
    ]
    table = Table(["operands of the loss", "seconds", "float32 = 1", "difference of the gradient"], rows)
    settings = result.settings
    text = f"""\
# Operands of the loss in a training step

Student and teacher forward, loss and backward of {settings["tokens"]} response tokens of {settings["source"]}
({", ".join(settings["overrides"])}), medians of {settings["rounds"]} rounds.

{origin(result)}

{table.markdown()}
"""
    return Report(text, {NAME: table})


if __name__ == "__main__":
    main()
