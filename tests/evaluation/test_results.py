"""Results of evaluations: what they say of their samples, and their JSON form."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from opsdl.evaluation import EvaluationResult, accuracy, gain, gains
from opsdl.evaluation.results import KindMeans
from tests.support.errors import refuses
from tests.support.results import made_up_result


def test_results_survive_their_json():
    result = made_up_result(1, 0.4)
    written = json.loads(json.dumps(result.to_json()))
    assert written == result.to_json()
    assert EvaluationResult.from_json(written, "before.json") == result


def test_the_json_says_the_accuracies():
    result = made_up_result(1, 0.4)
    chosen, written = result.sets[1], result.to_json()["sets"][1]
    assert result.to_json()["version"] == 2 and result.to_json()["seconds"] == 12.5
    assert set(written) == {"name", "task", "length", "items", "long", "short", "by_task", "samples"}
    assert (written["name"], written["length"], written["items"]) == ("python-2000", 2000, 30)
    scores = [sample["long_score"] for sample in written["samples"]]
    assert written["long"] == vars(accuracy(scores)) == vars(chosen.long)
    assert written["short"]["mean"] == pytest.approx(sum(s["short_score"] for s in written["samples"]) / 30)
    kinds = written["by_task"]
    assert list(kinds) == ["single", "multivalue"]
    assert kinds["multivalue"]["long"] == pytest.approx(sum(scores[1::2]) / 15)
    assert kinds["single"]["count"] == 15


def test_means_are_those_of_each_kind():
    chosen = made_up_result(1, 0.4).sets[0]
    samples = [
        replace(chosen.samples[0], task=task, long_score=long, short_score=short)
        for task, long, short in (("b", 1.0, 0.5), ("a", 0.0, 1.0), ("b", 0.0, 1.0))
    ]
    means = replace(chosen, samples=tuple(samples)).by_task
    assert list(means.items()) == [("b", KindMeans(0.5, 0.75, 2)), ("a", KindMeans(0.0, 1.0, 1))]


@pytest.mark.parametrize(
    ("data", "form"), [({"sets": [], "seconds": 1.0}, "1"), ({"version": 3, "sets": []}, "3"), ([], "None")]
)
def test_other_versions_are_refused(data, form):
    with refuses(
        f"before.json: an evaluation in form {form}, this opsdl reads 2; expected to evaluate again"
    ) as caught:
        EvaluationResult.from_json(data, "before.json")
    assert "\n" not in str(caught.value)


def test_gains_are_paired_set_by_set():
    before, after = made_up_result(1, 0.35), made_up_result(2, 0.75)
    for old, new, change in zip(before.sets, after.sets, gains(before, after), strict=True):
        expected = gain([s.long_score for s in old.samples], [s.long_score for s in new.samples])
        assert change == expected
        assert change.mean == pytest.approx(new.long.mean - old.long.mean)


@pytest.mark.parametrize("changed", [{"id": "other"}, {"answers": ("1",)}])
def test_results_of_different_items_are_not_compared(changed):
    before, after = made_up_result(1, 0.35), made_up_result(2, 0.75)
    first, second = after.sets
    samples = (replace(second.samples[0], **changed), *second.samples[1:])
    for other in ((first, replace(second, samples=samples)), (first,), (first, replace(second, name="other"))):
        with refuses("different items; expected the same sets and seed"):
            gains(before, replace(after, sets=other))
