"""Contexts of a given length in tokens: a passage with sentences hidden in it, and an excerpt around some of its lines.

Contexts are made of lines. Lengths are tokens of the text alone, without special tokens.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from opsdl.data.chat import count_tokens
from opsdl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GAP = "\n...\n"  # between two excerpts of a short context
UNIT_BATCH = 64  # units tokenized together; any number gives the same contexts


def hide(
    tokenizer: PreTrainedTokenizerBase, needles: Sequence[str], units: Sequence[str], length: int, rng: random.Random
) -> tuple[list[str], list[int]]:
    """Hide sentences in a passage of a text.

    Args:
        tokenizer: counts the tokens.
        needles: the sentences to hide, each in a line of its own at a random depth.
        units: the text, in reading order; the passage is a random run of its units, one a line.
        length: tokens of the passage with the needles in it; it is never exceeded.
        rng: draws the passage and the depths.

    Returns:
        The lines, and the number of the line that holds each needle.

    Raises:
        UserError: `length` cannot hold the needles and some text.
    """
    start = rng.randrange(len(units))
    depths = [rng.random() for _ in needles]
    room = length - sum(_line_counts(tokenizer, needles))
    while room > 0:
        lines = _passage(tokenizer, units, start, room)
        slots = [round(depth * len(lines)) for depth in depths]
        order = sorted(range(len(needles)), key=slots.__getitem__)
        for shift, needle in enumerate(order):
            slots[needle] += shift
            lines.insert(slots[needle], needles[needle])
        excess = _count(tokenizer, "\n".join(lines)) - length
        if excess <= 0:
            return lines, slots
        room -= excess  # this tokenizer is not additive over lines
    raise UserError(f"needles: length {length} cannot hold {len(needles)} needles ({length - room} tokens) and text")


def excerpt(
    tokenizer: PreTrainedTokenizerBase, lines: Sequence[str], evidence: Sequence[int], avoid: Sequence[int], length: int
) -> str:
    """Cut the lines of the evidence out of a context, with as many lines around them as fit.

    Every run of lines grows by turns in both directions until it would exceed `length` or meets a line to avoid.

    Args:
        tokenizer: counts the tokens.
        lines: the context.
        evidence: the numbers of the lines that the excerpt must hold.
        avoid: the numbers of the lines that it must not hold.
        length: tokens that are never exceeded.

    Returns:
        Runs of consecutive lines, a GAP between two of them.

    Raises:
        UserError: `length` cannot hold the evidence.
    """
    chosen = set(evidence)
    text = _join(lines, chosen)
    if _count(tokenizer, text) > length:
        raise UserError(
            f"needles: short_length {length} cannot hold the {len(evidence)} needles asked for; "
            f"expected at least {_count(tokenizer, text)}"
        )
    edges = [(index, step) for step in (-1, 1) for index in evidence]
    while edges:
        grown = []
        for index, step in edges:
            index += step
            if index in avoid or not 0 <= index < len(lines):
                continue
            candidate = _join(lines, chosen | {index})
            if _count(tokenizer, candidate) <= length:
                chosen.add(index)
                text = candidate
                grown.append((index, step))
        edges = grown
    return text


def runs(numbers: Iterable[int]) -> list[range]:
    """The runs of consecutive numbers among `numbers`, in ascending order."""
    found: list[range] = []
    for number in sorted(numbers):
        if found and number == found[-1].stop:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def _join(lines: Sequence[str], chosen: set[int]) -> str:
    return GAP.join("\n".join(lines[run.start : run.stop]) for run in runs(chosen))


def _passage(tokenizer: PreTrainedTokenizerBase, units: Sequence[str], start: int, room: int) -> list[str]:
    """Consecutive units from `start` on, past the end from the beginning, the last one cut so that `room` is filled.

    All units, uncut, where they do not fill it.
    """
    passage: list[str] = []
    while len(passage) < len(units):
        indices = range(start + len(passage), start + min(len(passage) + UNIT_BATCH, len(units)))
        batch = [units[index % len(units)] for index in indices]
        for unit, count in zip(batch, _line_counts(tokenizer, batch), strict=True):
            if count > room:
                cut = _cut(tokenizer, unit, room)
                return [*passage, cut] if cut else passage
            passage.append(unit)
            room -= count
    return passage


def _cut(tokenizer: PreTrainedTokenizerBase, unit: str, room: int) -> str:
    """The first words of a unit, as many as fit."""
    words = unit.split(" ")
    beginnings = [" ".join(words[:size]) for size in range(1, len(words) + 1)]
    return " ".join(words[: bisect_right(_line_counts(tokenizer, beginnings), room)])


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return count_tokens(tokenizer, [text])[0]


def _line_counts(tokenizer: PreTrainedTokenizerBase, lines: Sequence[str]) -> list[int]:
    """Tokens of each line with its line break."""
    return count_tokens(tokenizer, [line + "\n" for line in lines])
