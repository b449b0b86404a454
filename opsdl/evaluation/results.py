"""What an evaluation found, and its form as JSON.

Every answer is kept; accuracies are computed from the answers' scores, and stand in the JSON for its readers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from opsdl.errors import UserError
from opsdl.evaluation.scoring import Accuracy, accuracy

VERSION = 2  # 1 had no version, and named haystack and kinds of each set


@dataclass(frozen=True)
class Sample:
    """One item with both responses to it, and their scores in [0, 1]. `task` is the kind of question."""

    id: str
    task: str
    question: str
    answers: tuple[str, ...]
    long_score: float
    short_score: float
    long_text: str
    short_text: str


@dataclass(frozen=True)
class KindMeans:
    """Mean scores of one kind of question, over `count` items."""

    long: float
    short: float
    count: int


@dataclass(frozen=True)
class SetResult:
    """The answers to one evaluation set.

    `task` describes its questions in a phrase, `length` is the tokens of their long contexts.
    """

    name: str
    task: str
    length: int
    samples: tuple[Sample, ...]

    @cached_property
    def long(self) -> Accuracy:
        """The accuracy under the long context."""
        return accuracy([sample.long_score for sample in self.samples])

    @cached_property
    def short(self) -> Accuracy:
        """The accuracy under the short context."""
        return accuracy([sample.short_score for sample in self.samples])

    @cached_property
    def by_task(self) -> dict[str, KindMeans]:
        """The means of each kind of question, in the order in which the kinds first occur."""
        kinds: dict[str, list[Sample]] = {}
        for sample in self.samples:
            kinds.setdefault(sample.task, []).append(sample)
        return {
            kind: KindMeans(
                statistics.fmean(sample.long_score for sample in samples),
                statistics.fmean(sample.short_score for sample in samples),
                len(samples),
            )
            for kind, samples in kinds.items()
        }


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` returns: a result for each set of the config, and the wall time."""

    sets: tuple[SetResult, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Give the result in the form of its JSON file.

        {"version": 2,
         "sets": [{"name", "task", "length", "items",
                   "long": {"mean", "low", "high", "count"}, "short": {the same},
                   "by_task": {kind: {"long": mean, "short": mean, "count"}},
                   "samples": [{the fields of Sample}, one an item]}],
         "seconds": wall time}
        """
        return {"version": VERSION, "sets": [_set_to_json(result) for result in self.sets], "seconds": self.seconds}

    @classmethod
    def from_json(cls, data: Any, where: str) -> EvaluationResult:
        """Read the form that `to_json` gives.

        Args:
            data: the parsed JSON.
            where: the file it is from, for messages.

        Raises:
            UserError: the file is of another version.
        """
        version = data.get("version", 1) if isinstance(data, Mapping) else None
        if version != VERSION:
            raise UserError(
                f"{where}: an evaluation in form {version}, this opsdl reads {VERSION}; expected to evaluate again"
            )
        return cls(tuple(_set_from_json(chosen) for chosen in data["sets"]), data["seconds"])


def _set_to_json(result: SetResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "task": result.task,
        "length": result.length,
        "items": len(result.samples),
        "long": asdict(result.long),
        "short": asdict(result.short),
        "by_task": {kind: asdict(means) for kind, means in result.by_task.items()},
        "samples": [asdict(sample) | {"answers": list(sample.answers)} for sample in result.samples],
    }


def _set_from_json(data: Mapping[str, Any]) -> SetResult:
    samples = tuple(Sample(**(sample | {"answers": tuple(sample["answers"])})) for sample in data["samples"])
    return SetResult(data["name"], data["task"], data["length"], samples)
