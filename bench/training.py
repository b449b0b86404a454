"""The README's tables of what training gains, from the reports of `make train` and `make train-long` in results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.tables import Table

ROOT = Path(__file__).parents[1]
RUNS = {"train": "smollm2-kjv", "train-long": "smollm2-kjv-long"}
TEXTS = {"kjv": "King James Bible", "python": "Python docstrings (held out)"}
CONTEXTS = ("long context before", "long context after", "gain", "short context before", "short context after")


def tables() -> dict[str, Table]:
    """Table name -> a row for each evaluation set."""
    return {
        name: _table(json.loads((ROOT / "results" / run / "report.json").read_text())) for name, run in RUNS.items()
    }


def _table(report: dict[str, Any]) -> Table:
    rows = []
    for before, after, gain in zip(report["before"]["sets"], report["after"]["sets"], report["gain"], strict=True):
        scores = [_interval(before["long"]), _interval(after["long"]), _interval(gain, sign="+")]
        scores += [f"{100 * x['short']['mean']:.1f}" for x in (before, after)]
        rows.append([TEXTS[before["haystack"]], str(before["length"]), str(before["items"]), *scores])
    return Table(["text", "tokens", "items", *CONTEXTS], rows)


def _interval(score: dict[str, float], sign: str = "") -> str:
    """Percent, with the 95 % interval."""
    mean, low, high = (f"{100 * score[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
