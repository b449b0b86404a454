"""Triplets from raw documents by the paper's reverse construction: no retriever, no labels.

C_L    consecutive paragraphs of a document, up to `long_tokens`
C_S    a random run of C_L's paragraphs, up to `short_tokens`
Q      written from C_S, so C_S is relevant by construction; by the model itself with opsdl/training/questions.py

write_triplets("triplets.jsonl", prepare(["books/"], tokenizer=tokenizer, long_tokens=4096, short_tokens=512,
                                         questions=questions, per_document=4, seed=0))
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from opsdl.data.chat import count_tokens
from opsdl.data.triplets import Triplet
from opsdl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".md")
TASK = "self-instruct"
BREAK = "\n\n"  # between paragraphs


@dataclass(frozen=True)
class Document:
    """The text of a file in paragraphs."""

    path: Path
    paragraphs: list[str]
    counts: list[int]  # tokens of each paragraph with its break

    def long_runs(self, long_tokens: int, short_tokens: int) -> list[slice]:
        """List the runs of paragraphs that can be a long context: a short one fits inside."""
        return [run for run in _runs(self.counts, long_tokens) if min(self.counts[run]) <= short_tokens]


def prepare(
    paths: Iterable[str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase,
    long_tokens: int,
    short_tokens: int,
    questions: Callable[[str], list[str]],
    per_document: int = 1,
    seed: int = 0,
) -> Iterator[Triplet]:
    """Make triplets of documents.

    Paragraphs are separated by blank lines and stay whole: one longer than `short_tokens` is never in a short context,
    one longer than `long_tokens` in no context. Draw i depends on the seed and the document (its name and text), not on
    `per_document`.

    Args:
        paths: plain-text files, and directories, of which the .txt and .md files are taken; in the order given.
        tokenizer: counts the tokens, which are those of the text alone.
        long_tokens: tokens of a long context, at most.
        short_tokens: tokens of a short context, at most.
        questions: gives questions about a short context, or none.
        per_document: draws from each document; each asks for questions once.
        seed: another seed gives other draws.

    Returns:
        The triplets, one a question, each made when it is asked for.

    Raises:
        UserError: a path does not exist, a directory has no documents, or a document is empty, is not UTF-8 or has no
            paragraph of at most `short_tokens`; raised before any question is asked.
    """
    if not 0 < short_tokens <= long_tokens:
        raise UserError(f"prepare: short_tokens {short_tokens}, long_tokens {long_tokens}; expected 0 < short <= long")
    documents = [_read(path, tokenizer) for path in _find(paths)]
    for document in documents:
        if not document.long_runs(long_tokens, short_tokens):
            raise UserError(f"document {document.path}: every paragraph exceeds short_tokens {short_tokens}")
    return _triplets(documents, long_tokens, short_tokens, questions, per_document, seed)


def _triplets(
    documents: list[Document],
    long_tokens: int,
    short_tokens: int,
    questions: Callable[[str], list[str]],
    per_document: int,
    seed: int,
) -> Iterator[Triplet]:
    for document in documents:
        for draw in range(per_document):
            rng = random.Random(f"{seed}/{document.path.name}/{draw}")
            long = rng.choice(document.long_runs(long_tokens, short_tokens))
            short = rng.choice(_runs(document.counts[long], short_tokens))
            paragraphs = document.paragraphs[long]
            long_context, short_context = BREAK.join(paragraphs), BREAK.join(paragraphs[short])
            for number, question in enumerate(questions(short_context)):
                name = f"{document.path.name}-{draw}-{number}"
                yield Triplet(long_context, short_context, question, id=name, task=TASK)


def _runs(counts: list[int], limit: int) -> list[slice]:
    """The runs of consecutive paragraphs of at most `limit` tokens that no longer such run contains."""
    ends = list(accumulate(counts, initial=0))
    runs: list[slice] = []
    for start in range(len(counts)):
        stop = bisect_right(ends, ends[start] + limit) - 1
        if stop > start and (not runs or stop > runs[-1].stop):
            runs.append(slice(start, stop))
    return runs


def _find(paths: Iterable[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not inside:
                raise UserError(f"documents {path}: no {' or '.join(SUFFIXES)} file in this directory")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"document {path}: no such file or directory")
    return found


def _read(path: Path, tokenizer: PreTrainedTokenizerBase) -> Document:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"document {path}: not UTF-8 text at byte {error.start}") from None
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if not paragraphs:
        raise UserError(f"document {path}: empty; expected paragraphs of text")
    return Document(path, paragraphs, count_tokens(tokenizer, [paragraph + BREAK for paragraph in paragraphs]))
