"""`opsdl eval`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from opsdl.cli.arguments import FILE, check_parent, config_arguments
from opsdl.errors import UserError
from opsdl.files import write_whole

if TYPE_CHECKING:
    from opsdl.evaluation import Accuracy, EvaluationResult


@click.command("eval")
@config_arguments
@click.option("--checkpoint", type=FILE, help="Directory of a saved model to evaluate instead of model.name.")
@click.option("--out", type=FILE, help="JSON file for every answer and score; replaced if it is there.")
def evaluate(config: Path, overrides: tuple[str, ...], checkpoint: Path | None, out: Path | None) -> None:
    """Measure accuracy under long and short contexts.

    Answers the evaluation sets of the YAML file CONFIG. KEY.SUB=VALUE replaces a value of CONFIG.

    \b
    Example: opsdl eval recipes/smollm2-kjv.yaml --out base.json
    """
    from opsdl.config import load_config

    load_config(config, overrides)  # before the slow imports, so that most typos are answered at once

    from opsdl.training.recipe import load_recipe

    resolved = load_recipe(config, overrides)
    if not resolved.evaluation.sets:
        raise UserError(f"config {config}: key evaluation.sets is empty; expected at least one set to evaluate")
    if checkpoint is not None:
        if not checkpoint.is_dir():
            raise UserError(f"--checkpoint {checkpoint}: no such directory; expected one that holds a saved model")
        resolved.model = replace(resolved.model, name=str(checkpoint), gguf_file=None)
    if out is not None:
        check_parent("--out", out)

    from opsdl.evaluation import evaluate as run
    from opsdl.models import load_model, load_tokenizer, pick_device

    source = resolved.model.name, resolved.model.gguf_file
    result = run(
        load_model(*source, device=pick_device(resolved.device)),
        load_tokenizer(*source),
        resolved.evaluation,
        template=resolved.data.template,
        compute_dtype=resolved.model.compute_dtype,
        seed=resolved.seed,
    )
    click.echo(_accuracies(result))
    if out is not None:
        write_whole(out, json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n")


def _accuracies(result: EvaluationResult) -> str:
    """One line for each evaluation set, in percent with 95 % intervals."""
    lines = [("set", "items", "long context", "short context")]
    lines += [(s.name, str(len(s.samples)), _percent(s.long), _percent(s.short)) for s in result.sets]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _percent(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.mean:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"
