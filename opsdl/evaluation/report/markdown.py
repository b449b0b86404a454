"""The report of a run: report.md to read, report.json with every number behind it, report.png to look at."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from opsdl.errors import UserError
from opsdl.evaluation.report.plots import plot_report
from opsdl.evaluation.scoring import Accuracy, gain
from opsdl.files import write_whole

if TYPE_CHECKING:
    from opsdl.config import RunConfig

PARTS = ("rollout", "teacher", "student", "optimizer")  # metrics hold seconds_<part> of each step
SHOWN_SAMPLES, SHOWN_CHARACTERS = 3, 300
TEACHERS = {
    "frozen": "the frozen initial weights",
    "live": "the student's own current weights",
    "ema": "a moving average of the student's weights",
}
LOSSES = {"full": "the whole-vocabulary reverse KL", "policy": "the sampled-token form of the reverse KL"}


def write_report(
    run_dir: Path, config: RunConfig, before: dict[str, Any], after: dict[str, Any], metrics: list[dict[str, Any]]
) -> None:
    """Write report.json, report.md and report.png into `run_dir`, each whole or not at all.

    `before` and `after` are results of evaluate() with the weights before and after training, `metrics` the rows of
    metrics.jsonl, one a step. Raises UserError when before and after do not hold the same items.
    """
    gains = _gains(before, after)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _device_name(config.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    raw = facts | {
        "config": asdict(config),
        "before": before,
        "after": after,
        "gain": [{"name": s["name"], **asdict(change)} for s, change in zip(before["sets"], gains, strict=True)],
        "metrics": metrics,
    }
    title = f"OPSDL run {Path(run_dir).resolve().name}"
    write_whole(Path(run_dir, "report.json"), json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    write_whole(Path(run_dir, "report.png"), plot_report(before, after, metrics, title))
    write_whole(Path(run_dir, "report.md"), _markdown(title, config, before, after, metrics, facts))


def format_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The result as an aligned markdown table that also reads well in a terminal: one row for each evaluation set.

    Percent, with 95 % intervals in brackets; the gain is paired, in points. Raises UserError when before and after do
    not hold the same items.
    """
    header = ("set", "tokens", "items", "long before", "long after", "gain", "short before -> after")
    rows = [
        (
            old["name"],
            str(old["length"]),
            str(old["items"]),
            _interval(old["long"]),
            _interval(new["long"]),
            _interval(asdict(change), sign="+"),
            f"{_percent(old['short']['mean'])} -> {_percent(new['short']['mean'])}",
        )
        for old, new, change in zip(before["sets"], after["sets"], _gains(before, after), strict=True)
    ]
    return _table(header, rows)


def _gains(before: dict[str, Any], after: dict[str, Any]) -> list[Accuracy]:
    """The paired gain under the long context, one for each set."""
    if _items(before) != _items(after):
        raise UserError("report: evaluations before and after hold different items; expected the same sets and seed")
    return [
        gain([sample["long_score"] for sample in old["samples"]], [sample["long_score"] for sample in new["samples"]])
        for old, new in zip(before["sets"], after["sets"], strict=True)
    ]


def _items(result: dict[str, Any]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    return [(chosen["name"], [(s["id"], s["answers"]) for s in chosen["samples"]]) for chosen in result["sets"]]


def _markdown(
    title: str,
    config: RunConfig,
    before: dict[str, Any],
    after: dict[str, Any],
    metrics: list[dict[str, Any]],
    facts: dict[str, Any],
) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    blocks = [
        f"# {title}",
        _what_was_trained(config),
        "## Accuracy",
        "Percent of the expected answers found in the greedy response, with 95 % intervals. The gain is paired: the "
        "same items before and after, under the long context, in points.",
        format_table(before, after),
        "![KL, rollout accuracy and evaluation accuracy](report.png)",
        _disjointness(config),
        "## Accuracy by task",
        _task_table(before, after),
        "## Training",
        _training_table(metrics),
        "## Sample answers",
        "The first items of the sets in turn, not selected. Scores in parentheses.",
        *_samples(before, after),
        f"{facts['date']}, {facts['device']}, {versions}. Every number: report.json.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _what_was_trained(config: RunConfig) -> str:
    needles, rollout = config.data.needles, config.rollout
    if config.data.triplets:
        data = f"the triplets of `{Path(config.data.triplets).name}`"
    else:
        data = (
            f"needle questions ({', '.join(needles.kinds)}) in {needles.haystack} text, "
            f"{needles.length} tokens of long and {needles.short_length} of short context"
        )
    return (
        f"`{config.model.name}` was trained for {config.steps} steps of {config.prompts_per_step} prompts, "
        f"{rollout.group_size} responses each (at most {rollout.max_new_tokens} tokens, temperature "
        f"{rollout.temperature:g}), on {data}. The student answers under the long context; the teacher, "
        f"{TEACHERS[config.teacher.kind]}, scores the same responses under the short context. The loss is "
        f"{LOSSES[config.loss.kind]}, the gradient through the prefix {config.prefix_gradient}, the learning rate "
        f"{config.optimizer.lr:g}, the matrix products in {config.model.compute_dtype}, the seed {config.seed}."
    )


def _disjointness(config: RunConfig) -> str:
    """What is known about the overlap of evaluation and training; claims no more than the config shows."""
    if any(chosen.needles.split != "eval" for chosen in config.evaluation.sets):
        return "Some evaluation sets are drawn from the train split: they may share items with training."
    if config.data.triplets or config.data.needles.split != "train":
        return (
            "Evaluation items are drawn from the eval split; the training data were not, or not only, drawn from the "
            "train split, so nothing is claimed about their overlap."
        )
    return "Evaluation items share no key, value, wording or haystack region with training."


def _task_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    rows = [
        (
            old["name"],
            task,
            str(scores["count"]),
            *(
                f"{_percent(scores[context])} -> {_percent(new['by_task'][task][context])}"
                for context in ("long", "short")
            ),
        )
        for old, new in zip(before["sets"], after["sets"], strict=True)
        for task, scores in old["by_task"].items()
    ]
    return _table(("set", "task", "items", "long before -> after", "short before -> after"), rows)


def _training_table(metrics: list[dict[str, Any]]) -> str:
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


def _samples(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    pairs = list(zip(before["sets"], after["sets"], strict=True))
    blocks = []
    for index in range(SHOWN_SAMPLES if pairs else 0):
        old_set, new_set = pairs[index % len(pairs)]
        if index >= len(old_set["samples"]):
            continue
        old, new = old_set["samples"][index], new_set["samples"][index]
        lines = [
            f"question      {_one_line(old['question'])}",
            f"expected      {', '.join(old['answers'])}",
            f"long before   {_one_line(old['long_text'])} ({old['long_score']:.2g})",
            f"long after    {_one_line(new['long_text'])} ({new['long_score']:.2g})",
            f"short before  {_one_line(old['short_text'])} ({old['short_score']:.2g})",
            f"short after   {_one_line(new['short_text'])} ({new['short_score']:.2g})",
        ]
        blocks.append(f"{old_set['name']}, {old['task']}, item `{old['id']}`:")
        blocks.append("\n".join(["```text", *lines, "```"]))
    return blocks


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."


def _percent(fraction: float, sign: str = "") -> str:
    return f"{100 * fraction:{sign}.1f}"


def _interval(value: dict[str, float], sign: str = "") -> str:
    return f"{_percent(value['mean'], sign)} [{_percent(value['low'], sign)}, {_percent(value['high'], sign)}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _device_name(device: str) -> str:
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if device == "auto" else device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
