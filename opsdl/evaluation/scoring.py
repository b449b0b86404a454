"""The 95 % intervals of mean scores and of their differences: each is a line or two of arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Accuracy:
    """A mean score, or a difference of two, with its 95 % interval over `count` items; in fractions: 0.25, not 25."""

    mean: float
    low: float
    high: float
    count: int


def accuracy(scores: Sequence[float]) -> Accuracy:
    """Compute the mean of scores with its Wilson score interval.

    A fractional score (two of four values found) has no binomial distribution; the mean is then treated as the
    proportion. A score confined to [0, 1] varies at most as much as a 0/1 score of the same mean, so the interval
    errs on the wide side.

    Args:
        scores: each in [0, 1].

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("accuracy: no scores")
    n, mean = len(scores), statistics.fmean(scores)
    scale = 1 + Z95**2 / n
    centre = (mean + Z95**2 / (2 * n)) / scale
    half = Z95 * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2)) / scale
    # At a mean of 0 or 1 an end of the interval is the mean itself, which rounding must not put outside.
    return Accuracy(mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)), n)


def gain(before: Sequence[float], after: Sequence[float]) -> Accuracy:
    """Compute the mean of after - before over the same items, with a paired 95 % interval, in [-1, 1].

    Newcombe's paired interval (1998, method 8) combines the Wilson intervals of both means through the correlation of
    the two scores. Unlike mean +- 1.96 standard errors it keeps a width when every item changed alike, which happens
    with few items and with accuracies near 0 or 1.

    Args:
        before: a score in [0, 1] for each item.
        after: the same, in the same order.

    Raises:
        ValueError: the lists are of unequal length or empty.
    """
    if len(before) != len(after):
        raise ValueError(f"gain: {len(before)} scores before, {len(after)} after; expected the same items")
    first, last = accuracy(before), accuracy(after)
    correlation = _correlation(before, after)
    mean = last.mean - first.mean
    down = _difference_norm(last.mean - last.low, first.high - first.mean, correlation)
    up = _difference_norm(last.high - last.mean, first.mean - first.low, correlation)
    return Accuracy(mean, max(-1.0, mean - down), min(1.0, mean + up), len(before))


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Compute Pearson's correlation; 0 (the wide side) where a constant list or a single item leaves it undefined."""
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:
        return 0.0


def _difference_norm(a: float, b: float, correlation: float) -> float:
    """Compute the half-width of a difference whose terms have half-widths a and b."""
    # Rounding must not take the root below 0.
    return math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b))
