"""Scores and intervals against numbers worked out by hand, one real evaluation, and the report of a made-up run."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

from opsdl.config import EvaluationConfig, EvaluationSet, ModelConfig, NeedleConfig, RunConfig
from opsdl.data.chat import encode_prompt
from opsdl.data.tasks.needles import make_needles
from opsdl.errors import UserError
from opsdl.evaluation import accuracy, evaluate, format_table, found, gain, write_report
from opsdl.evaluation.evaluate import SEED_OFFSET
from opsdl.models import eos_token_ids

METRICS = (
    "step loss kl entropy response_length tokens_per_second seconds_rollout seconds_teacher seconds_student "
    "seconds_optimizer peak_memory_mib grad_norm lr accuracy"
).split()


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("The number is 123.", ["123"], 1.0),
        ("It is 51234.", ["123"], 0.0),
        ("It is 1234.", ["123"], 0.0),
        ("It is 4123.", ["123"], 0.0),
        ("First 91234, then 1234.", ["1234"], 1.0),  # a wrong occurrence does not hide a right one
        ("a1b and a12b", ["1", "12"], 1.0),  # letters beside a number do not make it longer
        ("silver FOX", ["Silver fox"], 1.0),
        ("foxes", ["fox"], 1.0),  # words are substrings, as in RULER
        ("one and two", ["one", "two", "three", "four"], 0.5),
        ("a.c", ["abc"], 0.0),
        ("abc", ["a.c"], 0.0),  # an answer is text, not a pattern
        ("", ["7"], 0.0),
    ],
)
def test_found(text, answers, expected):
    assert found(text, answers) == expected


def test_found_needs_answers():
    with pytest.raises(ValueError, match="no answers"):
        found("text", [])


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        ([1.0] * 5 + [0.0] * 5, 0.2366, 0.7634),
        ([0.5] * 10, 0.2366, 0.7634),  # fractional scores count through their mean
        ([0.0] * 10, 0.0, 0.2775),  # z^2 / (n + z^2) = 3.8415 / 13.8415
        ([1.0] * 10, 0.7225, 1.0),
        ([1.0], 0.2065, 1.0),
        ([1.0] * 81 + [0.0] * 182, 0.2553, 0.3662),  # Newcombe 1998, two-sided intervals, method 3
    ],
)
def test_wilson_interval(scores, low, high):
    result = accuracy(scores)
    assert result.mean == pytest.approx(sum(scores) / len(scores))
    assert (result.low, result.high) == pytest.approx((low, high), abs=5e-5)
    assert result.count == len(scores)


def test_accuracy_needs_scores():
    with pytest.raises(ValueError, match="no scores"):
        accuracy([])


def test_gain_uses_the_pairing():
    before = [1.0] * 10 + [0.0] * 10
    nested = gain(before, [1.0] * 13 + [0.0] * 7)  # what was right stayed right
    crossed = gain(before, [0.0] * 7 + [1.0] * 13)
    assert nested.mean == pytest.approx(0.15) and crossed.mean == pytest.approx(0.15)
    assert nested.count == 20
    assert nested.low < nested.mean < nested.high
    assert nested.high - nested.low < 0.8 * (crossed.high - crossed.low)


def test_gain_by_hand():
    # No pair correlates, so the half-widths of 5/10 (0.2634) add in quadrature: 0.3725 either way.
    result = gain([1.0, 1.0, 0.0, 0.0] * 5, [1.0, 0.0, 1.0, 0.0] * 5)
    half = 2**0.5 * (accuracy([1.0, 0.0] * 10).high - 0.5)
    assert (result.low, result.mean, result.high) == pytest.approx((-half, 0.0, half))


def test_gain_of_alike_items_keeps_a_width():
    everything = gain([0.0] * 10, [1.0] * 10)
    assert everything.mean == 1.0 == everything.high
    assert everything.low == pytest.approx(1 - 2**0.5 * 0.2775, abs=1e-4)
    assert gain([0.0], [1.0]).low < 0  # one item shows nothing


def test_gain_covers_the_truth():
    draw = random.Random(0)
    covered = 0
    for _ in range(400):
        before = [float(draw.random() < 0.4) for _ in range(40)]
        after = [1.0 if score and draw.random() < 0.9 else float(draw.random() < 0.5) for score in before]
        result = gain(before, after)  # the true gain: 0.4 * 0.95 + 0.6 * 0.5 - 0.4
        covered += result.low <= 0.28 <= result.high
    assert 0.92 <= covered / 400 <= 0.99


def test_gain_needs_the_same_items():
    with pytest.raises(ValueError, match="same items"):
        gain([1.0], [1.0, 0.0])


@pytest.fixture
def config(tmp_path):
    needles = NeedleConfig("python", split="eval", kinds=["single", "multivalue"], length=200, short_length=100)
    return RunConfig(
        run_dir=str(tmp_path),
        model=ModelConfig(name="tiny", compute_dtype="float32"),
        evaluation=EvaluationConfig([EvaluationSet("python-200", needles, items=2)], max_new_tokens=6, batch_size=3),
    )


def test_evaluate_agrees_with_greedy_decoding_by_transformers(tiny_model, tokenizer, config):
    tiny_model.train()
    result = evaluate(tiny_model, tokenizer, config, progress=False)
    assert tiny_model.training, "the mode the model came in"
    assert json.loads(json.dumps(result)) == result

    (chosen,) = result["sets"]
    triplets = make_needles(tokenizer, config.evaluation.sets[0].needles, 2, config.seed + SEED_OFFSET)
    assert (chosen["name"], chosen["length"], chosen["haystack"], chosen["items"]) == ("python-200", 200, "python", 2)
    assert [sample["id"] for sample in chosen["samples"]] == [triplet.id for triplet in triplets]
    assert sum(task["count"] for task in chosen["by_task"].values()) == 2
    tiny_model.eval()
    for triplet, sample in zip(triplets, chosen["samples"], strict=True):
        for name, context in (("long", triplet.long_context), ("short", triplet.short_context)):
            ids = torch.tensor([encode_prompt(tokenizer, context, triplet.question, config.data.template)])
            expected = tiny_model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=eos_token_ids(tiny_model, tokenizer),
                pad_token_id=0,
            )[0, ids.shape[1] :]
            text = tokenizer.decode(expected, skip_special_tokens=True).strip()
            assert sample[f"{name}_text"] == text
            assert sample[f"{name}_score"] == found(text, triplet.answers)


def test_evaluate_refuses_prompts_that_do_not_fit(tiny_model, tokenizer, config, monkeypatch):
    monkeypatch.setattr(tiny_model.config, "max_position_embeddings", 150)
    with pytest.raises(UserError, match="evaluation set python-200, item .*, long_context"):
        evaluate(tiny_model, tokenizer, config, progress=False)


def made_up_result(seed: int, bias: float) -> dict:
    """A result of evaluate() with random scores; `bias` is the chance to find an answer under the long context."""
    draw, sets = random.Random(seed), []
    described = (("kjv-1000", 1000, ["single", "multikey"]), ("python-2000", 2000, ["single", "multivalue"]))
    for name, length, tasks in described:
        samples = []
        for index in range(30):
            long_score, short_score = float(draw.random() < bias), draw.choice([0.5, 1.0, 1.0])
            samples.append(
                {
                    "id": f"{name}-{index}",
                    "task": tasks[index % 2],
                    "question": "What is the special number?",
                    "answers": [str(10000 + index)],
                    "long_score": long_score,
                    "short_score": short_score,
                    "long_text": f"It is {10000 + index}.\n```" if long_score else "I | cannot say.",
                    "short_text": "word " * 200,
                }
            )
        by_task = {}
        for task in tasks:
            members = [sample for sample in samples if sample["task"] == task]
            means = {c: sum(s[f"{c}_score"] for s in members) / len(members) for c in ("long", "short")}
            by_task[task] = means | {"count": len(members)}
        scores = {c: dataclasses.asdict(accuracy([s[f"{c}_score"] for s in samples])) for c in ("long", "short")}
        head = {"name": name, "length": length, "haystack": name.split("-")[0], "kinds": tasks, "items": len(samples)}
        sets.append(head | scores | {"by_task": by_task, "samples": samples})
    return {"sets": sets, "seconds": 12.5}


@pytest.fixture
def run(tmp_path):
    draw = random.Random(3)
    rows = []
    for step in range(1, 33):
        row = {name: draw.random() for name in METRICS}
        row |= {"step": step, "kl": (0.2 + draw.random()) / step, "accuracy": min(1.0, step / 40 + 0.3 * draw.random())}
        rows.append(row)
    config = RunConfig(run_dir=str(tmp_path), model=ModelConfig(name="a/model"))
    config.evaluation.sets = [EvaluationSet("kjv-1000"), EvaluationSet("python-2000")]
    return tmp_path, config, made_up_result(1, 0.35), made_up_result(2, 0.75), rows


def test_report_files_agree(run):
    run_dir, config, before, after, metrics = run
    write_report(*run)
    assert sorted(path.name for path in run_dir.iterdir()) == ["report.json", "report.md", "report.png"]

    raw = json.loads((run_dir / "report.json").read_text())
    assert set(raw) == {"date", "device", "versions", "config", "before", "after", "gain", "metrics"}
    assert (raw["before"], raw["after"], raw["metrics"]) == (before, after, metrics)
    assert raw["config"]["optimizer"]["lr"] == config.optimizer.lr
    assert raw["versions"]["torch"] == torch.__version__
    for old, new, change in zip(before["sets"], after["sets"], raw["gain"], strict=True):
        assert change["name"] == old["name"] and change["count"] == 30
        assert change["mean"] == pytest.approx(new["long"]["mean"] - old["long"]["mean"])

    text = (run_dir / "report.md").read_text()
    assert format_table(before, after) in text
    assert "32 steps" in text and "a/model" in text
    assert f"{metrics[0]['kl']:.4g} -> {metrics[-1]['kl']:.4g}" in text
    minutes = sum(value for row in metrics for name, value in row.items() if name.startswith("seconds_")) / 60
    assert f"{minutes:.1f}" in text
    assert text.count("```text") == 3
    assert "share no key, value, wording or haystack region" in text


def test_report_claims_no_disjointness_it_cannot_know(run):
    run_dir, config, *results = run
    config.data.triplets = "mine.jsonl"
    write_report(run_dir, config, *results)
    text = (run_dir / "report.md").read_text()
    assert "share no key" not in text and "nothing is claimed" in text and "`mine.jsonl`" in text


def test_report_picture(run):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    write_report(*run)
    height, width, _ = matplotlib_image.imread(run[0] / "report.png").shape
    assert (width, height) == (1800, 600)


def test_report_without_sets_steps_or_known_answers(run):
    run_dir, config, _, _, metrics = run
    nothing = {"sets": [], "seconds": 0.0}
    write_report(run_dir, config, nothing, nothing, [row | {"accuracy": None} for row in metrics])
    write_report(run_dir, config, nothing, nothing, [])
    assert "No step was made." in (run_dir / "report.md").read_text()


def test_failed_report_leaves_the_old_file(run, monkeypatch):
    write_report(*run)
    old = (run[0] / "report.json").read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(*run)
    assert (run[0] / "report.json").read_text() == old
    assert len(list(run[0].iterdir())) == 3


def test_table_is_aligned_and_consistent(run):
    _, _, before, after, _ = run
    lines = format_table(before, after).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    old, new = before["sets"][0], after["sets"][0]
    assert cells[:3] == ["kjv-1000", "1000", "30"]
    assert cells[3].startswith(f"{100 * old['long']['mean']:.1f} [")
    assert cells[4].startswith(f"{100 * new['long']['mean']:.1f} [")
    assert cells[5].startswith(f"{100 * (new['long']['mean'] - old['long']['mean']):+.1f} [")
    assert cells[6] == f"{100 * old['short']['mean']:.1f} -> {100 * new['short']['mean']:.1f}"


def test_table_refuses_different_items(run):
    _, _, before, after, _ = run
    after["sets"][1]["samples"][0]["id"] = "other"
    with pytest.raises(UserError, match="different items"):
        format_table(before, after)
