"""The text of a report: what was trained, what it gained, and answers to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsdl.config import RunConfig, build
from opsdl.data.tasks import TASKS
from opsdl.evaluation.report.tables import format_table, task_table, training_table
from opsdl.evaluation.results import EvaluationResult, Sample

SHOWN_SAMPLES, SHOWN_CHARACTERS = 3, 300


@dataclass(frozen=True)
class Run:
    """What a report is about: see `opsdl.evaluation.report.write_report`."""

    title: str
    config: RunConfig
    objective: str
    teacher: str
    before: EvaluationResult
    after: EvaluationResult
    metrics: Sequence[dict[str, Any]]


def markdown(run: Run, facts: dict[str, Any]) -> str:
    """Write the text of a report; `facts` holds the date, the device and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    blocks = [
        f"# {run.title}",
        _what_was_trained(run),
        "## Accuracy",
        "Percent of the expected answers found in the greedy response, with 95 % intervals. The gain is paired: the "
        "same items before and after, under the long context, in points.",
        format_table(run.before, run.after),
        "![KL, rollout accuracy and evaluation accuracy](report.png)",
        _disjointness(run.config),
        "## Accuracy by task",
        task_table(run.before, run.after),
        "## Training",
        training_table(run.metrics),
        "## Sample answers",
        "The first items of the sets in turn, not selected. Scores in parentheses.",
        *_samples(run.before, run.after),
        f"{facts['date']}, {facts['device']}, {versions}. Every number: report.json.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _what_was_trained(run: Run) -> str:
    config, rollout = run.config, run.config.rollout
    if config.data.triplets:
        data = f"the triplets of `{Path(config.data.triplets).name}`"
    else:
        data = build(TASKS, config.data.task, "data").describe()
    return (
        f"`{config.model.name}` was trained for {config.steps} steps of {config.prompts_per_step} prompts, "
        f"{rollout.group_size} responses each (at most {rollout.max_new_tokens} tokens, temperature "
        f"{rollout.temperature:g}), on {data}. The student answers under the long context; the teacher, "
        f"{run.teacher}, scores the same responses under the short context. The loss is "
        f"{run.objective}, the gradient through the prefix {config.prefix_gradient}, the learning rate "
        f"{config.optimizer.lr:g}, the matrix products in {config.model.compute_dtype}, the seed {config.seed}."
    )


def _disjointness(config: RunConfig) -> str:
    """What is known about the overlap of evaluation and training; claims no more than the config shows."""
    tasks = [build(TASKS, chosen.task, "evaluation.sets") for chosen in config.evaluation.sets]
    if any(task.split == "train" for task in tasks):
        return "Some evaluation sets are drawn from the train split: they may share items with training."
    trained = None if config.data.triplets else build(TASKS, config.data.task, "data")
    if trained is None or trained.split == "eval" or any(type(task) is not type(trained) for task in tasks):
        return (
            "Evaluation items are drawn from the eval split; the training data were not, or not only, drawn from the "
            "train split, so nothing is claimed about their overlap."
        )
    return f"Evaluation items share no {trained.apart()} with training."


def _samples(before: EvaluationResult, after: EvaluationResult) -> list[str]:
    pairs = list(zip(before.sets, after.sets, strict=True))
    blocks = []
    for index in range(SHOWN_SAMPLES if pairs else 0):
        old_set, new_set = pairs[index % len(pairs)]
        if index < len(old_set.samples):
            old, new = old_set.samples[index], new_set.samples[index]
            blocks += [f"{old_set.name}, {old.task}, item `{old.id}`:", _answers(old, new)]
    return blocks


def _answers(old: Sample, new: Sample) -> str:
    lines = [
        f"question      {_one_line(old.question)}",
        f"expected      {', '.join(old.answers)}",
        f"long before   {_one_line(old.long_text)} ({old.long_score:.2g})",
        f"long after    {_one_line(new.long_text)} ({new.long_score:.2g})",
        f"short before  {_one_line(old.short_text)} ({old.short_score:.2g})",
        f"short after   {_one_line(new.short_text)} ({new.short_score:.2g})",
    ]
    return "\n".join(["```text", *lines, "```"])


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."
