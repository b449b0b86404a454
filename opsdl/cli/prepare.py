"""`opsdl prepare`."""

from __future__ import annotations

from pathlib import Path

import click

from opsdl.cli.arguments import FILE, check_parent
from opsdl.errors import UserError


@click.command()
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
    check_parent("--out", out)

    from tqdm import tqdm

    from opsdl.data.prepare import prepare as run
    from opsdl.data.triplets import write_triplets
    from opsdl.models import load_model, load_tokenizer, pick_device
    from opsdl.training.questions import self_questions

    tokenizer = load_tokenizer(model, gguf_file)
    writer = load_model(model, gguf_file, device=pick_device("auto"))
    made = run(
        documents,
        tokenizer=tokenizer,
        long_tokens=long_tokens,
        short_tokens=short_tokens,
        questions=self_questions(writer, tokenizer, seed=seed),
        per_document=per_document,
        seed=seed,
    )
    triplets = list(tqdm(made, unit="triplet", disable=None))  # silent where nobody watches
    if not triplets:
        raise UserError(f"prepare: the model {model} wrote no question; expected one that follows instructions")
    write_triplets(out, triplets)
    click.echo(f"{out}: {len(triplets)} triplets")
