"""The report of a made-up run."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from opsdl.config import Chosen, EvaluationSet, ModelConfig, RunConfig
from opsdl.evaluation import EvaluationResult, format_table, write_report
from tests.support.errors import refuses
from tests.support.results import made_up_result

METRICS = (
    "step loss kl entropy response_length tokens_per_second seconds_rollout seconds_teacher seconds_student "
    "seconds_optimizer peak_memory_mib grad_norm lr accuracy"
).split()
BEFORE, AFTER = made_up_result(1, 0.35), made_up_result(2, 0.75)


@pytest.fixture
def metrics():
    draw = random.Random(3)
    rows = []
    for step in range(1, 33):
        row = {name: draw.random() for name in METRICS}
        row |= {"step": step, "kl": (0.2 + draw.random()) / step, "accuracy": min(1.0, step / 40 + 0.3 * draw.random())}
        rows.append(row)
    return rows


@pytest.fixture
def config(tmp_path):
    config = RunConfig(run_dir=str(tmp_path), model=ModelConfig(name="a/model"), device="cpu")
    config.evaluation.sets = [EvaluationSet("kjv-1000"), EvaluationSet("python-2000")]
    return config


@pytest.fixture
def write(tmp_path, config, metrics):
    def write(before=BEFORE, after=AFTER, metrics=metrics) -> str:
        write_report(tmp_path, config, before, after, metrics, objective="the toy loss", teacher="the toy teacher")
        return (tmp_path / "report.md").read_text()

    return write


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes seconds."""
    monkeypatch.setattr("opsdl.evaluation.report.plot_report", lambda *_: b"")


def test_report_files_agree(write, config, metrics, tmp_path):
    text = write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "report.png"]

    raw = json.loads((tmp_path / "report.json").read_text())
    assert set(raw) == {"version", "date", "device", "versions", "config", "before", "after", "gain", "metrics"}
    assert raw["version"] == 2
    assert EvaluationResult.from_json(raw["before"], "") == BEFORE
    assert EvaluationResult.from_json(raw["after"], "") == AFTER
    assert raw["metrics"] == metrics
    assert raw["config"]["optimizer"]["lr"] == config.optimizer.lr and raw["config"]["data"]["needles"] == {}
    assert raw["versions"]["torch"] == torch.__version__ and raw["device"].startswith("CPU (")
    for old, new, change in zip(BEFORE.sets, AFTER.sets, raw["gain"], strict=True):
        assert change["name"] == old.name and change["count"] == 30
        assert change["mean"] == pytest.approx(new.long.mean - old.long.mean)

    assert format_table(BEFORE, AFTER) in text
    assert f"{metrics[0]['kl']:.4g} -> {metrics[-1]['kl']:.4g}" in text
    minutes = sum(value for row in metrics for name, value in row.items() if name.startswith("seconds_")) / 60
    assert f"{minutes:.1f}" in text
    assert raw["date"] in text and raw["device"] in text and f"torch {torch.__version__}" in text


@pytest.mark.usefixtures("no_picture")
def test_the_report_says_what_was_trained(write, config):
    config.data.task = Chosen("needles", {"kinds": ["multikey"], "length": 700})
    assert (
        "`a/model` was trained for 32 steps of 4 prompts, 4 responses each (at most 24 tokens, temperature 0.8), on "
        "needle questions (multikey) in kjv text, 700 tokens of long and 150 of short context. The student answers "
        "under the long context; the teacher, the toy teacher, scores the same responses under the short context. The "
        "loss is the toy loss, the gradient through the prefix exact, the learning rate 3e-05, the matrix products in "
        "bfloat16, the seed 0."
    ) in write()


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    ("train", "evaluation", "claim"),
    [
        ({}, {}, "share no key, value, wording or haystack region with training"),
        ({"split": "train"}, {"split": "eval"}, "share no key, value, wording or haystack region with training"),
        ({}, {"split": "train"}, "Some evaluation sets are drawn from the train split"),
        ({"split": "eval"}, {}, "nothing is claimed about their overlap"),
    ],
)
def test_the_report_claims_the_disjointness_that_the_config_shows(write, config, train, evaluation, claim):
    config.data.task = Chosen("needles", train)
    config.evaluation.sets[1].task = Chosen("needles", evaluation)
    text = write()
    assert claim in text and ("share no" in text) == claim.startswith("share no")


@pytest.mark.usefixtures("no_picture")
def test_the_report_claims_no_disjointness_from_a_file(write, config):
    config.data.triplets = "some/where/mine.jsonl"
    text = write()
    assert "share no key" not in text and "nothing is claimed" in text and "on the triplets of `mine.jsonl`." in text


@pytest.mark.usefixtures("no_picture")
def test_the_report_shows_the_first_answers_of_the_sets_in_turn(write):
    text = write()
    assert text.count("```text") == 3
    for name, item in (("kjv-1000", 0), ("python-2000", 1), ("kjv-1000", 2)):
        old, new = (next(s for s in r.sets if s.name == name).samples[item] for r in (BEFORE, AFTER))
        block = text.split(f"{name}, {old.task}, item `{old.id}`:\n\n```text\n")[1].split("\n```")[0].split("\n")
        assert block[:2] == [f"question      {old.question}", f"expected      {old.answers[0]}"]
        assert block[2] == f"long before   {' '.join(old.long_text.split())} ({old.long_score:.2g})"
        assert block[3] == f"long after    {' '.join(new.long_text.split())} ({new.long_score:.2g})"
        assert block[4] == f"short before  {old.short_text[:300]} ... ({old.short_score:.2g})"
        assert block[5] == f"short after   {new.short_text[:300]} ... ({new.short_score:.2g})"


@pytest.mark.usefixtures("no_picture")
def test_the_report_has_a_row_for_each_kind_of_question(write):
    text = write()
    for old, new in zip(BEFORE.sets, AFTER.sets, strict=True):
        for kind, means in old.by_task.items():
            cells = [old.name, kind, "15"]
            for first, last in ((means.long, new.by_task[kind].long), (means.short, new.by_task[kind].short)):
                cells.append(f"{100 * first:.1f} -> {100 * last:.1f}")
            assert cells in [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]


def test_the_picture(write, tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    write()
    height, width, _ = matplotlib_image.imread(tmp_path / "report.png").shape
    assert (width, height) == (1800, 600)


def test_a_report_without_sets_steps_or_known_answers(write, metrics):
    nothing = EvaluationResult((), 0.0)
    write(nothing, nothing, [row | {"accuracy": None} for row in metrics])
    assert "No step was made." in write(nothing, nothing, [])


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_report_where_every_answer_is_alike(write, score):
    chosen = BEFORE.sets[0]
    samples = tuple(replace(sample, long_score=score, short_score=score) for sample in chosen.samples[:5])
    alike = EvaluationResult((replace(chosen, samples=samples),), 1.0)
    assert "+0.0 [" in write(alike, alike)


@pytest.mark.usefixtures("no_picture")
def test_a_failed_report_leaves_the_old_file(write, tmp_path, monkeypatch):
    write()
    old = (tmp_path / "report.json").read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write()
    assert (tmp_path / "report.json").read_text() == old
    assert len(list(tmp_path.iterdir())) == 3


def test_the_table_is_aligned_and_consistent():
    lines = format_table(BEFORE, AFTER).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    old, new = BEFORE.sets[0], AFTER.sets[0]
    assert cells[:3] == ["kjv-1000", "1000", "30"]
    assert cells[3].startswith(f"{100 * old.long.mean:.1f} [{100 * old.long.low:.1f}, {100 * old.long.high:.1f}]")
    assert cells[4].startswith(f"{100 * new.long.mean:.1f} [")
    assert cells[5].startswith(f"{100 * (new.long.mean - old.long.mean):+.1f} [")
    assert cells[6] == f"{100 * old.short.mean:.1f} -> {100 * new.short.mean:.1f}"


def test_reports_of_different_items_are_refused_before_anything_is_written(write, tmp_path):
    with refuses("different items"):
        write(BEFORE, EvaluationResult(AFTER.sets[:1], 1.0))
    assert not list(tmp_path.iterdir())
