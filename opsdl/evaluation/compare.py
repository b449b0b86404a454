"""Two evaluations of the same items, compared item by item."""

from __future__ import annotations

from opsdl.errors import UserError
from opsdl.evaluation.results import EvaluationResult
from opsdl.evaluation.scoring import Accuracy, gain


def gains(before: EvaluationResult, after: EvaluationResult) -> list[Accuracy]:
    """Compute what each set has gained under the long context, with a paired interval.

    Raises:
        UserError: before and after do not hold the same items.
    """
    if _items(before) != _items(after):
        raise UserError("report: evaluations before and after hold different items; expected the same sets and seed")
    return [
        gain([sample.long_score for sample in old.samples], [sample.long_score for sample in new.samples])
        for old, new in zip(before.sets, after.sets, strict=True)
    ]


def _items(result: EvaluationResult) -> list[tuple[str, list[tuple[str, tuple[str, ...]]]]]:
    return [(chosen.name, [(sample.id, sample.answers) for sample in chosen.samples]) for chosen in result.sets]
