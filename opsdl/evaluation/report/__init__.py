"""The report of a run: report.md to read, report.json with every number behind it, report.png to look at."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from opsdl.config import RunConfig, as_mapping
from opsdl.evaluation.compare import gains
from opsdl.evaluation.report.markdown import Run, markdown
from opsdl.evaluation.report.plots import plot_report
from opsdl.evaluation.report.tables import format_table
from opsdl.evaluation.results import EvaluationResult
from opsdl.files import write_whole

__all__ = ["format_table", "write_report"]

VERSION = 2  # of report.json; 1 had no version


def write_report(
    run_dir: Path,
    config: RunConfig,
    before: EvaluationResult,
    after: EvaluationResult,
    metrics: Sequence[dict[str, Any]],
    *,
    objective: str,
    teacher: str,
) -> None:
    """Write report.json, report.md and report.png, each whole or not at all.

    Args:
        run_dir: where they go.
        config: that of the run.
        before: the evaluation with the weights before training.
        after: the same items with the weights after it.
        metrics: a row for each step, with at least "step", "kl", "accuracy" and seconds of each part of the step.
        objective: names the loss in a phrase, e.g. "the whole-vocabulary reverse KL".
        teacher: names the teacher in a phrase, e.g. "the frozen initial weights".

    Raises:
        UserError: before and after do not hold the same items.
    """
    changes = gains(before, after)
    run = Run(f"OPSDL run {Path(run_dir).resolve().name}", config, objective, teacher, before, after, metrics)
    facts = _facts(config.device)
    raw = {
        "version": VERSION,
        **facts,
        "config": as_mapping(config),
        "before": before.to_json(),
        "after": after.to_json(),
        "gain": [{"name": old.name, **asdict(change)} for old, change in zip(before.sets, changes, strict=True)],
        "metrics": list(metrics),
    }
    write_whole(Path(run_dir, "report.json"), json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    write_whole(Path(run_dir, "report.png"), plot_report(before, after, metrics, run.title))
    write_whole(Path(run_dir, "report.md"), markdown(run, facts))


def _facts(device: str) -> dict[str, Any]:
    """When, on what, and with which versions."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _device_name(device),
        "versions": versions,
    }


def _device_name(device: str) -> str:
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if device == "auto" else device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
