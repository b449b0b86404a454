"""Scores by the text alone: whether a response contains the answers."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence


def found(text: str, answers: Sequence[str]) -> float:
    """Compute the fraction of the answers that a text contains: RULER's string_match_all, case-insensitive.

    An answer that begins or ends with a digit must not continue as a longer run of digits in the text:
    "123" is in "it is 123." and not in "51234".

    Args:
        text: a response.
        answers: the strings that a right response contains.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: there are no answers to look for.
    """
    if not answers:
        raise ValueError("found: no answers to look for")
    return statistics.fmean(bool(_pattern(answer).search(text)) for answer in answers)


def _pattern(answer: str) -> re.Pattern[str]:
    left = r"(?<!\d)" if answer[:1].isdigit() else ""
    right = r"(?!\d)" if answer[-1:].isdigit() else ""
    return re.compile(left + re.escape(answer) + right, re.IGNORECASE)
