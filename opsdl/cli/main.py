"""The `opsdl` command: its group, and what becomes of errors. Each command is a file beside this one.

Heavy imports happen inside the commands, so that `opsdl --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from opsdl import __version__
from opsdl.cli.evaluate import evaluate
from opsdl.cli.info import info
from opsdl.cli.prepare import prepare
from opsdl.cli.train import train
from opsdl.errors import UserError

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; sys.argv's without the name where there are none.

    Returns:
        The exit code. Bad input is one line on stderr and code 2, without a traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        return commands.main(arguments, prog_name="opsdl", standalone_mode=False) or 0
    except click.ClickException as error:
        return _fail(error.format_message())
    except UserError as error:
        return _fail(str(error))
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "opsdl":  # a defect of ours, not a package that the user lacks
            raise
        return _fail(f"{error}; pip install 'opsdl[train]' brings the packages that this command needs")
    except click.Abort as error:
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        return _fail("interrupted", INTERRUPTED)


def _fail(message: str, code: int = BAD_INPUT) -> int:
    click.echo(f"opsdl: error: {' '.join(message.split())}", err=True)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="opsdl %(version)s")
def commands() -> None:
    """On-policy self-distillation for long context.

    \b
    Example: opsdl train recipes/smollm2-kjv.yaml
    """


for command in (train, evaluate, prepare, info):
    commands.add_command(command)
