"""`opsdl train`."""

from __future__ import annotations

from pathlib import Path

import click

from opsdl.cli.arguments import config_arguments


@click.command()
@config_arguments
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train as the YAML file CONFIG says, and report.

    Evaluates before and after training, and writes metrics, checkpoints and a report into run_dir.

    KEY.SUB=VALUE replaces a value of CONFIG. resume=auto goes on from the newest checkpoint in run_dir.

    \b
    Example: opsdl train recipes/smollm2-kjv.yaml optimizer.lr=1e-5 steps=20 resume=auto
    """
    from opsdl.config import load_config

    load_config(config, overrides)  # before the slow imports, so that most typos are answered at once

    from opsdl.training.recipe import load_recipe

    resolved = load_recipe(config, overrides)

    from opsdl.training.run import train as run

    run(resolved)
