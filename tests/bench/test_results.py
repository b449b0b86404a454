"""Committed results, and that every table of the README comes from them."""

import json
import re
from statistics import median

import pytest

from bench import report
from bench.results import README, RESULTS, Case, Number, Result, load, save
from bench.tables import Table, fill, message, names

RESULT = Result(
    "x", "python -m bench.x", "2026-01-01", {"threads": 1}, {"torch": "2"}, {"rounds": 3},
    [Case("a", "A", {"N": n}, {"time": Number.timed([1.0, 2.0, 4.0], "ms")}) for n in (1, 2)],
)  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    return report.reports()


@pytest.mark.parametrize("name", report.REPORTS)
def test_markdown_is_what_the_json_gives(name, reports):
    assert (RESULTS / f"{name}.md").read_text() == reports[name].markdown


def test_the_readme_has_the_tables_of_training_and_of_the_benches():
    assert {"train", "train-long", "loss-time", "loss-memory", "loss-error"} <= set(names(README.read_text()))


@pytest.mark.parametrize("name", names(README.read_text()))
def test_the_readme_shows_what_was_measured(name, reports):
    shown = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", README.read_text(), re.DOTALL)
    assert shown and shown[1] == report.readme_tables(reports)[name].markdown()


@pytest.mark.parametrize("name", report.REPORTS)
def test_committed_numbers_are_the_medians_of_their_rounds(name):
    numbers = [number for case in load(RESULTS / f"{name}.json").cases for number in case.numbers.values()]
    assert numbers
    for number in numbers:
        assert number.rounds is None or number.value == median(number.rounds)


def test_a_result_survives_its_file(tmp_path):
    save(RESULT, tmp_path / "x.json")
    assert load(tmp_path / "x.json") == RESULT


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="schema 99; expected 1"):
        load(tmp_path / "x.json")


def test_cases_are_found_by_their_conditions():
    assert RESULT.only("a", N=2) is RESULT.cases[1]
    assert RESULT.select(N=3) == [] and RESULT.distinct("N") == [(1,), (2,)]


def test_tables_go_between_their_markers_only():
    text = "before\n<!-- table: x -->\nold\n<!-- end -->\n<!-- table: y -->\nkept\n<!-- end -->\nafter\n"
    filled = fill(text, {"x": Table(["a", "b"], [["1", message("2|3")]]), "z": Table(["c"], [])})
    assert filled == text.replace("old", "| a | b |\n| --- | --- |\n| 1 | 2/3 |")
    with pytest.raises(ValueError, match="table x: no"):
        fill("<!-- table: x -->\n", {"x": Table(["a"], [])})
