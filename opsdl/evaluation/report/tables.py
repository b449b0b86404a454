"""The tables of a report, as aligned Markdown that also reads well in a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from opsdl.evaluation.compare import gains
from opsdl.evaluation.results import EvaluationResult
from opsdl.evaluation.scoring import Accuracy

PARTS = ("rollout", "teacher", "student", "optimizer")  # metrics hold seconds_<part> of each step


def format_table(before: EvaluationResult, after: EvaluationResult) -> str:
    """Format the accuracies before and after: one row for each evaluation set.

    They are in percent with 95 % intervals in brackets; the gain is paired, in points.

    Raises:
        UserError: before and after do not hold the same items.
    """
    header = ("set", "tokens", "items", "long before", "long after", "gain", "short before -> after")
    rows = [
        (
            old.name,
            str(old.length),
            str(len(old.samples)),
            _interval(old.long),
            _interval(new.long),
            _interval(change, sign="+"),
            _change(old.short.mean, new.short.mean),
        )
        for old, new, change in zip(before.sets, after.sets, gains(before, after), strict=True)
    ]
    return _table(header, rows)


def task_table(before: EvaluationResult, after: EvaluationResult) -> str:
    """Format the mean scores of each kind of question: one row for each kind in each evaluation set."""
    rows = [
        (old.name, task, str(means.count), _change(means.long, trained.long), _change(means.short, trained.short))
        for old, new in zip(before.sets, after.sets, strict=True)
        for task, means in old.by_task.items()
        for trained in (new.by_task[task],)
    ]
    return _table(("set", "task", "items", "long before -> after", "short before -> after"), rows)


def training_table(metrics: Sequence[dict[str, Any]]) -> str:
    """Format what the steps took, and how far the KL fell."""
    if not metrics:
        return "No step was made."
    seconds = {part: [row[f"seconds_{part}"] for row in metrics] for part in PARTS}
    rows = [
        ("steps", str(len(metrics))),
        ("minutes of training", f"{sum(map(sum, seconds.values())) / 60:.1f}"),
        ("KL, first step -> last step", f"{metrics[0]['kl']:.4g} -> {metrics[-1]['kl']:.4g}"),
        *((f"mean seconds a step, {part}", f"{statistics.fmean(values):.2f}") for part, values in seconds.items()),
    ]
    return _table(("quantity", "value"), rows)


def _percent(fraction: float, sign: str = "") -> str:
    return f"{100 * fraction:{sign}.1f}"


def _change(before: float, after: float) -> str:
    return f"{_percent(before)} -> {_percent(after)}"


def _interval(value: Accuracy, sign: str = "") -> str:
    return f"{_percent(value.mean, sign)} [{_percent(value.low, sign)}, {_percent(value.high, sign)}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
