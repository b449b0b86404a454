"""A training example, and the JSONL file that holds many of them, one object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from opsdl.errors import UserError
from opsdl.files import write_whole


@dataclass(frozen=True)
class Triplet:
    """One question with the context that the student sees and the excerpt of it that the teacher sees.

    `answers` are the strings that a right response contains; empty when nobody knows them (scoring then skips the
    triplet). `task` names the kind of question, `id` the triplet.
    """

    long_context: str
    short_context: str
    question: str
    answers: tuple[str, ...] = ()
    id: str = ""
    task: str = ""


Placed = tuple[str, Triplet]  # with its place, "file:line", for messages
Shorten = Callable[[str, str], str | None]  # a long context and a question -> the short context, None for not found

TEXTS = ("long_context", "question", "short_context")  # required, not blank
KEYS = tuple(field.name for field in fields(Triplet))


def read_triplets(path: str | Path, shorten: Shorten | None = None) -> list[Placed]:
    """Read a JSONL file of triplets; blank lines are skipped.

    Args:
        path: the file.
        shorten: finds the short context of a line that gives none.

    Returns:
        The triplets, each with its place "file:line".

    Raises:
        UserError: names the file and the line for broken JSON, a missing, unknown or wrongly typed key, or a blank
            text, and for a short context that is not found; names the file when it does not exist, is not UTF-8, or
            holds no triplet.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"triplets {path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"triplets {path}: not UTF-8 text at byte {error.start}") from None
    places = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not places:
        raise UserError(f"triplets {path}: empty; expected one JSON object a line")
    return [(place, _parse(line, place, shorten)) for place, line in places]


def write_triplets(path: str | Path, triplets: Iterable[Triplet]) -> None:
    """Write triplets as JSONL. The file appears whole or not at all; an interrupted write leaves the old one.

    Args:
        path: the file.
        triplets: what goes into it, one a line.

    Raises:
        UserError: the directory does not exist or cannot be written.
    """
    path = Path(path)
    text = "".join(json.dumps(asdict(triplet), ensure_ascii=False) + "\n" for triplet in triplets)
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"triplets {path}: cannot write in {path.parent}: {error.strerror}") from None


def _parse(line: str, where: str, shorten: Shorten | None) -> Triplet:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    unknown = sorted(row.keys() - set(KEYS))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(KEYS)}")
    for key in TEXTS:
        if key == "short_context" and key not in row:
            row[key] = _short_context(row["long_context"], row["question"], where, shorten)
        if key not in row:
            raise UserError(f"{where}: key {key!r} is missing")
        if not isinstance(row[key], str) or not row[key].strip():
            raise UserError(f"{where}: key {key!r} is {_shown(row[key])}; expected text that is not blank")
    for key in ("id", "task"):
        if not isinstance(row.get(key, ""), str):
            raise UserError(f"{where}: key {key!r} is {_shown(row[key])}; expected text")
    answers = row.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer for answer in answers):
        raise UserError(f"{where}: key 'answers' is {_shown(answers)}; expected a list of strings that are not empty")
    return Triplet(**(row | {"answers": tuple(answers)}))


def _short_context(long_context: str, question: str, where: str, shorten: Shorten | None) -> str:
    if shorten is None:
        raise UserError(f"{where}: key 'short_context' is missing; expected it, or a data.extractor that finds it")
    short_context = shorten(long_context, question)
    if short_context is None:
        raise UserError(f"{where}: key 'short_context' is missing, and data.extractor finds nothing for the question")
    return short_context


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
