"""Scores of answers and their 95 % intervals, written out by hand: each is a line or two of arithmetic."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Accuracy:
    """A mean score, or a difference of two, with its 95 % interval over `count` items. As fractions: 0.25, not 25."""

    mean: float
    low: float
    high: float
    count: int


def found(text: str, answers: Sequence[str]) -> float:
    """Fraction of `answers` that `text` contains, in [0, 1]: RULER's string_match_all, case-insensitive.

    An answer that begins or ends with a digit must not continue as a longer run of digits in the text:
    "123" is in "it is 123." and not in "51234". Raises ValueError when there are no answers to look for.
    """
    if not answers:
        raise ValueError("found: no answers to look for")
    return statistics.fmean(bool(_pattern(answer).search(text)) for answer in answers)


def accuracy(scores: Sequence[float]) -> Accuracy:
    """Mean of `scores` (each in [0, 1]) with its Wilson score interval.

    A fractional score (two of four values found) has no binomial distribution; the mean is then treated as the
    proportion. A score confined to [0, 1] varies at most as much as a 0/1 score of the same mean, so the interval
    errs on the wide side. Raises ValueError without scores.
    """
    if not scores:
        raise ValueError("accuracy: no scores")
    n, mean = len(scores), statistics.fmean(scores)
    scale = 1 + Z95**2 / n
    centre = (mean + Z95**2 / (2 * n)) / scale
    half = Z95 * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2)) / scale
    return Accuracy(mean, max(0.0, centre - half), min(1.0, centre + half), n)


def gain(before: Sequence[float], after: Sequence[float]) -> Accuracy:
    """Mean of after - before over the same items in the same order, with a paired 95 % interval, in [-1, 1].

    Newcombe's paired interval (1998, method 8): the Wilson intervals of both means, combined through the correlation of
    the two scores. Unlike mean +- 1.96 standard errors it keeps a width when every item changed alike, which happens
    with few items and with accuracies near 0 or 1. Raises ValueError for lists of unequal length or without scores.
    """
    if len(before) != len(after):
        raise ValueError(f"gain: {len(before)} scores before, {len(after)} after; expected the same items")
    first, last = accuracy(before), accuracy(after)
    correlation = _correlation(before, after)
    mean = last.mean - first.mean
    down = _difference_norm(last.mean - last.low, first.high - first.mean, correlation)
    up = _difference_norm(last.high - last.mean, first.mean - first.low, correlation)
    return Accuracy(mean, max(-1.0, mean - down), min(1.0, mean + up), len(before))


def _pattern(answer: str) -> re.Pattern[str]:
    left = r"(?<!\d)" if answer[:1].isdigit() else ""
    right = r"(?!\d)" if answer[-1:].isdigit() else ""
    return re.compile(left + re.escape(answer) + right, re.IGNORECASE)


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson correlation; 0 (the wide side) where a constant list or a single item leaves it undefined."""
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:
        return 0.0


def _difference_norm(a: float, b: float, correlation: float) -> float:
    """Half-width of a difference whose terms have half-widths a and b. Rounding must not take the root below 0."""
    return math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b))
