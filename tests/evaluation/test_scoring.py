"""Intervals against numbers worked out by hand."""

from __future__ import annotations

import random

import pytest

from opsdl.evaluation import accuracy, gain


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        ([1.0] * 5 + [0.0] * 5, 0.2366, 0.7634),
        ([0.5] * 10, 0.2366, 0.7634),  # fractional scores count through their mean
        ([0.0] * 10, 0.0, 0.2775),  # z^2 / (n + z^2) = 3.8415 / 13.8415
        ([1.0] * 10, 0.7225, 1.0),
        ([1.0], 0.2065, 1.0),
        ([1.0] * 81 + [0.0] * 182, 0.2553, 0.3662),  # Newcombe 1998, two-sided intervals, method 3
    ],
)
def test_wilson_interval(scores, low, high):
    result = accuracy(scores)
    assert result.mean == pytest.approx(sum(scores) / len(scores))
    assert (result.low, result.high) == pytest.approx((low, high), abs=5e-5)
    assert result.count == len(scores)


def test_accuracy_needs_scores():
    with pytest.raises(ValueError, match="no scores"):
        accuracy([])


def test_gain_uses_the_pairing():
    before = [1.0] * 10 + [0.0] * 10
    nested = gain(before, [1.0] * 13 + [0.0] * 7)  # what was right stayed right
    crossed = gain(before, [0.0] * 7 + [1.0] * 13)
    assert nested.mean == pytest.approx(0.15) and crossed.mean == pytest.approx(0.15)
    assert nested.count == 20
    assert nested.low < nested.mean < nested.high
    assert nested.high - nested.low < 0.8 * (crossed.high - crossed.low)


def test_gain_by_hand():
    # No pair correlates, so the half-widths of 5/10 (0.2634) add in quadrature: 0.3725 either way.
    result = gain([1.0, 1.0, 0.0, 0.0] * 5, [1.0, 0.0, 1.0, 0.0] * 5)
    half = 2**0.5 * (accuracy([1.0, 0.0] * 10).high - 0.5)
    assert (result.low, result.mean, result.high) == pytest.approx((-half, 0.0, half))


def test_gain_of_alike_items_keeps_a_width():
    everything = gain([0.0] * 10, [1.0] * 10)
    assert everything.mean == 1.0 == everything.high
    assert everything.low == pytest.approx(1 - 2**0.5 * 0.2775, abs=1e-4)
    assert gain([0.0], [1.0]).low < 0  # one item shows nothing


def test_gain_covers_the_truth():
    draw = random.Random(0)
    covered = 0
    for _ in range(400):
        before = [float(draw.random() < 0.4) for _ in range(40)]
        after = [1.0 if score and draw.random() < 0.9 else float(draw.random() < 0.5) for score in before]
        result = gain(before, after)  # the true gain: 0.4 * 0.95 + 0.6 * 0.5 - 0.4
        covered += result.low <= 0.28 <= result.high
    assert 0.92 <= covered / 400 <= 0.99


def test_gain_needs_the_same_items():
    with pytest.raises(ValueError, match="same items"):
        gain([1.0], [1.0, 0.0])


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_an_interval_holds_its_mean(score):
    """By a rounding it did not, for some counts, and the picture of the report could not be drawn."""
    for count in range(1, 300):
        result = accuracy([score] * count)
        assert result.low <= result.mean <= result.high
