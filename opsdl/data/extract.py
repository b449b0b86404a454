"""Short contexts for those who have long contexts and questions only: extractors, which search the one for the other.

To add an extractor, write a class with `extract` and put its name into EXTRACTORS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from opsdl.data.chat import count_tokens
from opsdl.data.tasks.passages import GAP, runs
from opsdl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARAGRAPH = re.compile(r"\S.*(?:\n.*\S.*)*")  # lines that are not blank, as many as follow each other
LINE = re.compile(r"\S.*")


class Extractor(Protocol):
    """A way to find what a question needs in a long context."""

    def extract(self, long_context: str, question: str, max_tokens: int) -> str | None:
        """Cut a short context out of a long one.

        Args:
            long_context: the text to search.
            question: what is asked about it.
            max_tokens: tokens that the short context may have, without special tokens.

        Returns:
            Excerpts in reading order, a line "..." between two of them; None when nothing matches.
        """


class Bm25:
    """Lexical search: the paragraphs whose words match the question's best, by Okapi BM25 in the package bm25s.

    A paragraph ends at a blank line; one of more than `max_tokens` is searched line by line. Words are runs of letters
    and digits, so a script without spaces between words needs another extractor. Raises UserError when the package is
    not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        try:
            import bm25s  # only an extraction needs it
        except ImportError:
            raise UserError("extractor bm25: the package bm25s is not installed; expected: pip install bm25s") from None
        self._bm25s, self._tokenizer = bm25s, tokenizer

    def extract(self, long_context: str, question: str, max_tokens: int) -> str | None:
        """Cut the best paragraphs out, as many as fit, best first; see `Extractor.extract`."""
        units, counts = self._units(long_context, max_tokens)
        scores = self._scores([long_context[unit.start : unit.stop] for unit in units], question)
        matching = [index for index, score in enumerate(scores) if score > 0]
        chosen: set[int] = set()
        text, used = None, 0
        for index in sorted(matching, key=lambda index: -scores[index]):  # a stable sort: the earlier one of two equals
            if used + counts[index] > max_tokens:
                continue  # a shorter one may still fit
            candidate = _join(long_context, units, chosen | {index})
            tokens = count_tokens(self._tokenizer, [candidate])[0]
            if tokens <= max_tokens:
                chosen.add(index)
                text, used = candidate, tokens
        return text

    def _units(self, text: str, max_tokens: int) -> tuple[list[slice], list[int]]:
        """Where each paragraph, or line of a long one, stands in the text; and its tokens."""
        units: list[slice] = []
        paragraphs = _spans(PARAGRAPH, text, slice(0, len(text)))
        for paragraph, count in zip(paragraphs, self._counts(text, paragraphs), strict=True):
            units += [paragraph] if count <= max_tokens else _spans(LINE, text, paragraph)
        return units, self._counts(text, units)

    def _counts(self, text: str, units: Sequence[slice]) -> list[int]:
        return count_tokens(self._tokenizer, [text[unit] for unit in units]) if units else []

    def _scores(self, units: list[str], question: str) -> list[float]:
        """How well each unit matches the question; 0 for those that share no word with it."""
        split = self._bm25s.tokenize([*units, question], return_ids=False, show_progress=False)
        words = set().union(*split[:-1])
        asked = [word for word in split[-1] if word in words]
        if not asked:
            return [0.0] * len(units)
        index = self._bm25s.BM25()
        index.index(split[:-1], show_progress=False)
        return index.get_scores(asked).tolist()


EXTRACTORS: dict[str, Callable[[PreTrainedTokenizerBase], Extractor]] = {"bm25": Bm25}


def _spans(pattern: re.Pattern[str], text: str, within: slice) -> list[slice]:
    return [slice(*match.span()) for match in pattern.finditer(text, within.start, within.stop)]


def _join(text: str, units: Sequence[slice], chosen: set[int]) -> str:
    """The chosen units as they stand in the text; what lies between two neighbours stays."""
    return GAP.join(text[units[run[0]].start : units[run[-1]].stop] for run in runs(chosen))
