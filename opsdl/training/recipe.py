"""A recipe: a config file whose choices from the tables are complete and known to be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opsdl.config import Chosen, RunConfig, build, load_config
from opsdl.data.tasks import TASKS
from opsdl.training.objectives import OBJECTIVES


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config as `load_config` does, and check the options of its tasks and its objective too.

    Returns:
        The config, in which every choice holds all its options.

    Raises:
        UserError: names the file or the override, and the key.
    """
    config = load_config(path, overrides)
    config.data.task = _complete(TASKS, config.data.task, "data")
    config.loss = _complete(OBJECTIVES, config.loss, "loss")
    for index, chosen in enumerate(config.evaluation.sets):
        chosen.task = _complete(TASKS, chosen.task, f"evaluation.sets[{index}]")
    return config


def _complete(table: Mapping[str, type[Any]], chosen: Chosen, key: str) -> Chosen:
    return Chosen(chosen.name, asdict(build(table, chosen, key)))
