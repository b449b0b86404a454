"""A run from its config: what it leaves behind, how it stops and goes on, and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from opsdl.cli.main import main
from opsdl.config import (
    Chosen,
    DataConfig,
    EvaluationConfig,
    EvaluationSet,
    ModelConfig,
    OptimizerConfig,
    TeacherConfig,
    to_yaml,
)
from opsdl.data.tasks.needles import Needles
from opsdl.data.triplets import Triplet, write_triplets
from opsdl.errors import UserError
from opsdl.training.run import train
from opsdl.training.rundir import RunDir
from tests.support.training import NEEDLES, make_loop


def run_dir(config):
    return RunDir(replace(config, resume="auto"))


def test_a_run_leaves_everything_behind(config, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(config)
    run = run_dir(config)
    assert sorted(path.name for path in run.path.iterdir()) == [
        "after.json", "before.json", "checkpoints", "config.yaml", "metrics.jsonl", "report.json", "report.md",
        "report.png", "samples.jsonl",
    ]  # fmt: skip
    rows = run.rows("metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == pytest.approx(row["kl"]) and row["kl"] > 0
        assert 0 < row["entropy"] <= math.log(60000) and 1 <= row["response_length"] <= 5
        assert all(row[f"seconds_{part}"] > 0 for part in ("rollout", "teacher", "student", "optimizer"))
        assert row["tokens_per_second"] > 0 and row["peak_memory_mib"] > 100 and row["grad_norm"] > 0
    assert [row["lr"] for row in rows] == [5e-4, 1e-3, 1e-3, 1e-3]
    assert all(len(row["responses"]) == 3 for row in run.rows("samples.jsonl"))
    (checkpoint,) = (run.path / "checkpoints").iterdir()
    assert checkpoint.name == "step-00004"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.config._attn_implementation == "sdpa" and "opsdl" not in (checkpoint / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template
    assert "tiny" in capsys.readouterr().out
    train(replace(config, resume="auto"))  # a finished run only writes its report again
    assert len(run.rows("metrics.jsonl")) == 4


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"teacher": TeacherConfig(kind="ema", ema_decay=0.5)},
        {"teacher": TeacherConfig(kind="live"), "prefix_gradient": "detached"},
    ],
    ids=["frozen", "ema", "live, detached"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config, change, tmp_path):
    config = replace(config, **change)
    straight = make_loop(config)
    straight.run()
    config = replace(config, run_dir=str(tmp_path / "resumed"))
    first = make_loop(config)
    for _ in range(2):
        first.step()
    first.save()
    first.step()  # not saved: must run again, to the same end
    second = make_loop(replace(config, resume="auto"))
    assert second.done == 2
    second.run()
    for name, tensor in straight.student.model.state_dict().items():
        assert torch.equal(tensor, second.student.model.state_dict()[name]), name
    drop = lambda rows: [{k: v for k, v in r.items() if not k.startswith(("seconds", "tok", "peak"))} for r in rows]  # noqa: E731
    assert drop(straight.log.run.rows("metrics.jsonl")) == drop(second.log.run.rows("metrics.jsonl"))
    assert straight.log.run.rows("samples.jsonl") == second.log.run.rows("samples.jsonl")


def test_the_engine_is_closed_however_training_ends(config, monkeypatch):
    closed = []
    monkeypatch.setattr("opsdl.training.rollout.builtin.BuiltinEngine.close", lambda engine: closed.append(engine))
    train(replace(config, steps=1, evaluation=EvaluationConfig(sets=[])))
    broken = replace(config, run_dir=config.run_dir + "-broken", optimizer=OptimizerConfig(lr=1e30, warmup_steps=1))
    with pytest.raises(UserError, match="step 2"):
        train(replace(broken, evaluation=EvaluationConfig(sets=[])))
    assert len(closed) == 2


def test_old_checkpoints_go_and_the_newest_stay(config):
    loop = make_loop(replace(config, keep_checkpoints=2, checkpoint_every=1))
    loop.run()
    names = sorted(path.name for path in loop.checkpoints.folder.iterdir())
    assert names == ["step-00003", "step-00004"]
    trainer = json.loads((loop.checkpoints.newest / "trainer.json").read_text())
    assert loop.checkpoints.newest.name == "step-00004" and trainer == {"step": 4}


def test_checkpoints_are_written_when_due(config, monkeypatch):
    loop = make_loop(replace(config, steps=5, checkpoint_every=2))
    saved = []
    monkeypatch.setattr(type(loop), "save", lambda self: saved.append(self.done))
    loop.run()
    assert saved == [2, 4, 5]


def test_exploding_weights_end_in_one_line(config, tmp_path, capsys):
    """With an absurd learning rate the next rollout has no finite logits: one line, exit code 2, checkpoint kept."""
    settings = replace(config, optimizer=OptimizerConfig(lr=1e30, warmup_steps=1), checkpoint_every=1)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    assert main(["train", str(path)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "opsdl: error: step 2: " in last and "not finite" in last and "step-00001" in last
    assert load_file(tmp_path / "run" / "checkpoints" / "step-00001" / "model.safetensors")


def test_own_triplets_without_answers_or_evaluation(config, tokenizer, tmp_path):
    items = [Needles(**NEEDLES).item(tokenizer, "train", 0, index) for index in range(3)]
    write_triplets(tmp_path / "own.jsonl", [replace(item, answers=()) for item in items])
    own = replace(
        config, data=DataConfig(triplets=str(tmp_path / "own.jsonl")), evaluation=EvaluationConfig(sets=[]), steps=2
    )
    train(own)
    assert [row["accuracy"] for row in run_dir(own).rows("metrics.jsonl")] == [None, None]
    assert (tmp_path / "run" / "report.md").exists() and (tmp_path / "run" / "report.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interruption_leaves_a_checkpoint_that_resumes(number, config, tmp_path):
    settings = replace(config, steps=400, checkpoint_every=1000, evaluation=EvaluationConfig(sets=[]))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    command = [sys.executable, "-m", "opsdl.cli", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err + out
    done = metrics.read_text().count("\n")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:05d}"]
    loop = make_loop(replace(settings, resume="auto"))
    assert loop.done == done
    assert loop.step()["step"] == done + 1


def triplets(folder, name, **change):
    good = Triplet("a long context with a page", "a page", "what?", ("a",))
    write_triplets(folder / name, [good, replace(good, **change)])
    return DataConfig(triplets=str(folder / name))


FAR = {**NEEDLES, "length": 2100}
REFUSED = {
    "long context": (
        lambda folder: {"data": triplets(folder, "a.jsonl", long_context="word " * 2100)},
        r"a.jsonl:2, long_context: 21\d\d prompt tokens \+ 5 new tokens",
    ),
    "short context": (
        lambda folder: {"data": triplets(folder, "b.jsonl", short_context="word " * 2100)},
        "b.jsonl:2, short_context",
    ),
    "no file": (lambda folder: {"data": DataConfig(triplets="nowhere.jsonl")}, "nowhere.jsonl: no such file"),
    "long needles": (
        lambda folder: {"data": DataConfig(task=Chosen("needles", FAR))},
        "long_context: .* exceed the model's limit of 2048",
    ),
    "no model": (lambda folder: {"model": ModelConfig(name="no/where/at/all")}, "no/where/at/all"),
    "no device": (lambda folder: {"device": "abacus"}, "device 'abacus'"),
    "long evaluation": (
        lambda folder: {
            "evaluation": EvaluationConfig(sets=[EvaluationSet("far", 1, Chosen("needles", FAR))]),
        },
        "evaluation set far, .* exceed the model's limit of 2048",
    ),
    "no engine": (lambda folder: {"rollout": "abacus"}, "key rollout.engine is 'abacus'; expected one of builtin"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_runs_are_refused_before_anything_is_written(case, config, tmp_path):
    change, message = REFUSED[case]
    changes = change(tmp_path)
    if "rollout" in changes:
        changes = {"rollout": replace(config.rollout, engine=changes["rollout"])}
    with pytest.raises(UserError, match=message) as caught:
        train(replace(config, **changes))
    assert "\n" not in str(caught.value)
    assert not os.path.exists(config.run_dir)


def test_a_run_directory_holds_one_run(config):
    make_loop(config)
    with pytest.raises(UserError, match="holds a run already"):
        make_loop(config)
    with pytest.raises(UserError, match=r"started with optimizer.lr=0.001, now 0.01"):
        make_loop(replace(config, resume="auto", optimizer=replace(config.optimizer, lr=0.01)))
    with pytest.raises(UserError, match=r"started with loss.kind=full, now policy"):
        make_loop(replace(config, resume="auto", loss=Chosen("policy")))


def test_half_a_line_of_metrics_is_forgotten(config):
    loop = make_loop(config)
    loop.step()
    loop.save()
    with open(loop.log.run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    again = make_loop(replace(config, resume="auto"))
    assert [row["step"] for row in again.log.run.rows("metrics.jsonl")] == [1]
    assert json.loads((again.log.run.path / "metrics.jsonl").read_text())["step"] == 1
