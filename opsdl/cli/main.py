"""The `opsdl` command. Heavy imports happen inside the commands, so that `opsdl --help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from opsdl import __version__
from opsdl.errors import UserError
from opsdl.files import write_whole

FILE = click.Path(path_type=Path)
BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Bad input is one line on stderr and code 2, no traceback."""
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


def _config_arguments(command: Callable[..., None]) -> Callable[..., None]:
    overrides = click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
    return click.argument("config", type=FILE)(overrides(command))


@commands.command()
@_config_arguments
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train as the YAML file CONFIG says, and report.

    Evaluates before and after training, and writes metrics, checkpoints and a report into run_dir.

    KEY.SUB=VALUE replaces a value of CONFIG. resume=auto goes on from the newest checkpoint in run_dir.

    \b
    Example: opsdl train recipes/smollm2-kjv.yaml optimizer.lr=1e-5 steps=20 resume=auto
    """
    from opsdl.config import load_config

    resolved = load_config(config, overrides)  # before the slow import, so that a typo is answered at once

    from opsdl.training.loop import train as run

    run(resolved)


@commands.command("eval")
@_config_arguments
@click.option("--checkpoint", type=FILE, help="Directory of a saved model to evaluate instead of model.name.")
@click.option("--out", type=FILE, help="JSON file for every answer and score; replaced if it is there.")
def evaluate(config: Path, overrides: tuple[str, ...], checkpoint: Path | None, out: Path | None) -> None:
    """Measure accuracy under long and short contexts.

    Answers the evaluation sets of the YAML file CONFIG. KEY.SUB=VALUE replaces a value of CONFIG.

    \b
    Example: opsdl eval recipes/smollm2-kjv.yaml --out base.json
    """
    from opsdl.config import load_config

    resolved = load_config(config, overrides)
    if not resolved.evaluation.sets:
        raise UserError(f"config {config}: key evaluation.sets is empty; expected at least one set to evaluate")
    if checkpoint is not None:
        if not checkpoint.is_dir():
            raise UserError(f"--checkpoint {checkpoint}: no such directory; expected one that holds a saved model")
        resolved.model = replace(resolved.model, name=str(checkpoint), gguf_file=None)
    if out is not None:
        _check_parent("--out", out)

    from opsdl.evaluation.evaluate import evaluate as run
    from opsdl.models import load_model, load_tokenizer, pick_device

    device = pick_device(resolved.device)
    result = run(load_model(resolved.model, device), load_tokenizer(resolved.model), resolved)
    click.echo(_accuracies(result))
    if out is not None:
        write_whole(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


@commands.command()
@click.argument("documents", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--model", required=True, help="Hub id or local directory of the model that writes the questions.")
@click.option("--gguf-file", help="GGUF file inside that directory.")
@click.option("--out", required=True, type=FILE, help="JSONL file to write; it must not exist.")
@click.option("--long-tokens", default=4096, show_default=True, type=click.IntRange(min=1))
@click.option("--short-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--per-document", default=4, show_default=True, type=click.IntRange(min=1), help="Questions to try for.")
@click.option("--seed", default=0, show_default=True)
def prepare(
    documents: tuple[Path, ...],
    model: str,
    gguf_file: str | None,
    out: Path,
    long_tokens: int,
    short_tokens: int,
    per_document: int,
    seed: int,
) -> None:
    """Make training triplets of text documents.

    DOCUMENTS are text files, or directories of .txt and .md files. The long context is a passage of a document, the
    short context a part of it, and the model writes the question.

    \b
    Example: opsdl prepare books/ --model HuggingFaceTB/SmolLM2-135M-Instruct --out triplets.jsonl
    """
    if out.exists():
        raise UserError(f"--out {out}: exists already; expected a new file")
    _check_parent("--out", out)

    from tqdm import tqdm

    from opsdl.config import ModelConfig
    from opsdl.data.prepare import prepare as run
    from opsdl.data.prepare import self_questions
    from opsdl.data.triplets import write_triplets
    from opsdl.models import load_model, load_tokenizer, pick_device

    source = ModelConfig(name=model, gguf_file=gguf_file)
    tokenizer = load_tokenizer(source)
    writer = load_model(source, pick_device("auto"))
    triplets = list(
        tqdm(
            run(
                documents,
                tokenizer=tokenizer,
                long_tokens=long_tokens,
                short_tokens=short_tokens,
                questions=self_questions(writer, tokenizer, seed=seed),
                per_document=per_document,
                seed=seed,
            ),
            unit="triplet",
            disable=None,  # where nobody watches
        )
    )
    if not triplets:
        raise UserError(f"prepare: the model {model} wrote no question; expected one that follows instructions")
    write_triplets(out, triplets)
    click.echo(f"{out}: {len(triplets)} triplets")


@commands.command()
def info() -> None:
    """Print versions, devices and loss backends.

    \b
    Example: opsdl info
    """
    from opsdl.cli.facts import info as run

    for name, value in run().items():
        click.echo(f"{name + ':':<26} {value}")


def _check_parent(option: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: no such directory {path.parent}")


def _accuracies(result: dict[str, Any]) -> str:
    """One row for each evaluation set, in percent with 95 % intervals."""
    rows = [("set", "items", "long context", "short context")]
    rows += [(s["name"], str(s["items"]), _percent(s["long"]), _percent(s["short"])) for s in result["sets"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _percent(accuracy: dict[str, float]) -> str:
    return f"{100 * accuracy['mean']:.1f} [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]"
