"""Arguments that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from opsdl.errors import UserError

FILE = click.Path(path_type=Path)


def config_arguments(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the command takes CONFIG and its overrides."""
    overrides: Callable[[Any], Any] = click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
    return click.argument("config", type=FILE)(overrides(command))


def check_parent(option: str, path: Path) -> None:
    """Raises UserError where the directory that a file is to be written in does not exist."""
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: no such directory {path.parent}")
