"""The loop on a tiny model and real text: what it learns from, what it leaves behind, how it stops and goes on."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer

import opsdl.training.loop as loop
from opsdl.cli.main import main
from opsdl.config import (
    DataConfig,
    EvaluationConfig,
    EvaluationSet,
    LossConfig,
    ModelConfig,
    NeedleConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    to_yaml,
)  # fmt: skip
from opsdl.data.prompts import Prompts
from opsdl.data.tasks.needles import make_needles
from opsdl.data.triplets import Triplet, write_triplets
from opsdl.errors import UserError
from opsdl.models import load_model, load_tokenizer
from opsdl.training.loop import Trainer, train
from opsdl.training.rundir import RunDir

NEEDLES = NeedleConfig(kinds=["multikey"], length=160, short_length=60)


@pytest.fixture
def config(tiny_model_dir, tmp_path):
    return RunConfig(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(name=str(tiny_model_dir)),
        data=DataConfig(needles=NEEDLES),
        rollout=RolloutConfig(group_size=3, max_new_tokens=5),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        evaluation=EvaluationConfig(
            sets=[EvaluationSet(name="tiny", items=2, needles=replace(NEEDLES, split="eval"))], max_new_tokens=4
        ),
        steps=4,
        prompts_per_step=2,
        checkpoint_every=2,
        device="cpu",
    )


def make_trainer(config):
    tokenizer, model = load_tokenizer(config.model), load_model(config.model)
    run = RunDir(config)
    run.create()
    return Trainer(config, run, model, tokenizer, Prompts(config, tokenizer, 2048, torch.device("cpu")))


def final_weights(config):
    return load_file(RunDir(replace(config, resume="auto")).checkpoint / "model.safetensors")


def test_a_run_leaves_everything_behind(config, capsys):
    train(config)
    run = RunDir(replace(config, resume="auto"))
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
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-00004"]
    model = AutoModelForCausalLM.from_pretrained(run.checkpoint)
    assert model.config._attn_implementation == "sdpa" and "opsdl" not in (run.checkpoint / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(run.checkpoint).chat_template
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
    straight = make_trainer(config)
    straight.run_steps()
    config = replace(config, run_dir=str(tmp_path / "resumed"))
    first = make_trainer(config)
    for _ in range(2):
        first.step()
    first.save()
    first.step()  # not saved: must run again, to the same end
    second = make_trainer(replace(config, resume="auto"))
    assert second.done == 2
    second.run_steps()
    for name, tensor in straight.student.state_dict().items():
        assert torch.equal(tensor, second.student.state_dict()[name]), name
    drop = lambda rows: [{k: v for k, v in r.items() if not k.startswith(("seconds", "tok", "peak"))} for r in rows]  # noqa: E731
    assert drop(straight.run.rows("metrics.jsonl")) == drop(second.run.rows("metrics.jsonl"))
    assert straight.run.rows("samples.jsonl") == second.run.rows("samples.jsonl")


def test_equal_contexts_give_no_kl_and_no_gradient(config, tokenizer, tmp_path):
    triplets = [replace(t, short_context=t.long_context) for t in make_needles(tokenizer, NEEDLES, 4, seed=0)]
    write_triplets(tmp_path / "same.jsonl", triplets)
    same = replace(
        config,
        data=DataConfig(triplets=str(tmp_path / "same.jsonl")),
        model=replace(config.model, compute_dtype="float32"),
        teacher=TeacherConfig(kind="live"),
    )
    metrics = make_trainer(same).step()
    assert 0 <= metrics["kl"] < 1e-9 and metrics["grad_norm"] < 1e-5
    different = make_trainer(replace(config, run_dir=str(tmp_path / "other"))).step()
    assert different["kl"] > 1e-4 and different["grad_norm"] > 1e-3


@pytest.mark.parametrize("kind", ["frozen", "live", "ema"])
@pytest.mark.parametrize("loss", [LossConfig("full"), LossConfig("policy"), LossConfig("policy", "kl")])
def test_teachers_and_losses(config, kind, loss):
    trainer = make_trainer(replace(config, teacher=TeacherConfig(kind, ema_decay=0.9), loss=loss))
    initial = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    for _ in range(2):
        assert math.isfinite(trainer.step()["loss"])
    moved = {name: p.detach() - initial[name] for name, p in trainer.student.named_parameters()}
    assert all(change.abs().max() > 0 for change in moved.values())
    assert (trainer.teacher.model is trainer.student) == (kind == "live")
    for name, p in trainer.teacher.model.named_parameters():
        if kind == "frozen":
            # Linear layers are kept as autocast would cast them.
            assert torch.equal(p, initial[name].to(p.dtype)) and not p.requires_grad and p.grad is None
        if kind == "ema":
            assert 0 < (p - initial[name]).norm() < 0.3 * moved[name].norm()


def test_activation_checkpointing_and_packed_stream_give_the_same_step(config, tmp_path):
    norms = []
    for i, checkpointing in enumerate((False, True)):
        model = replace(config.model, activation_checkpointing=checkpointing, compute_dtype="float32")
        trainer = make_trainer(replace(config, model=model, run_dir=str(tmp_path / str(i))))
        norms.append(trainer.step()["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_distillation_closes_the_gap(config):
    """Twenty steps on two fixed prompts: the KL to the frozen teacher must fall, or nothing is learnt."""
    settings = replace(config, steps=20, checkpoint_every=100, optimizer=OptimizerConfig(lr=3e-3, warmup_steps=1))
    trainer = make_trainer(settings)
    fixed = trainer.prompts.batch(0)
    trainer.prompts.batch = lambda step: fixed
    kls = [trainer.step()["kl"] for _ in range(20)]
    assert sum(kls[-3:]) < 0.5 * sum(kls[:3])


def test_a_loss_that_is_not_a_number_stops_before_the_weights(config, monkeypatch):
    trainer = make_trainer(config)
    trainer.step()
    trainer.save()
    saved = final_weights(config)
    real = loop.fused_reverse_kl

    def broken(*args, **kwargs):
        value, stats = real(*args, **kwargs)
        return value * torch.nan, stats

    monkeypatch.setattr(loop, "fused_reverse_kl", broken)
    with pytest.raises(UserError, match=r"step 2: the loss is nan, .* last checkpoint, .*step-00001, is as it was"):
        trainer.step()
    for name, tensor in trainer.student.state_dict().items():
        if name in saved:
            assert torch.equal(tensor, saved[name])
    assert all(torch.equal(tensor, saved[name]) for name, tensor in final_weights(config).items())


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
    triplets = [replace(t, answers=()) for t in make_needles(tokenizer, NEEDLES, 3, seed=0)]
    write_triplets(tmp_path / "own.jsonl", triplets)
    data, nothing = DataConfig(triplets=str(tmp_path / "own.jsonl")), EvaluationConfig(sets=[])
    train(replace(config, data=data, evaluation=nothing, steps=2))
    rows = RunDir(replace(config, data=data, evaluation=nothing, steps=2, resume="auto")).rows("metrics.jsonl")
    assert [row["accuracy"] for row in rows] == [None, None]
    assert (tmp_path / "run" / "report.md").exists() and (tmp_path / "run" / "report.png").exists()


def test_ctrl_c_leaves_a_checkpoint_that_resumes(config, tmp_path):
    settings = replace(config, steps=400, checkpoint_every=1000, run_dir=str(tmp_path / "run"))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    command = [sys.executable, "-m", "opsdl.cli", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err + out
    done = metrics.read_text().count("\n")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:05d}"]
    trainer = make_trainer(replace(settings, resume="auto"))
    assert trainer.done == done
    assert trainer.step()["step"] == done + 1


def test_bad_runs_are_refused_before_anything_is_written(config, tokenizer, tmp_path):
    def triplets(name, **change):
        path = tmp_path / name
        good = Triplet("a long context with a page", "a page", "what?", ("a",))
        write_triplets(path, [good, replace(good, **change)])
        return DataConfig(triplets=str(path))

    long = "word " * 2100
    far = EvaluationSet(name="far", items=1, needles=replace(NEEDLES, split="eval", length=2100))
    cases = [
        (
            {"data": triplets("a.jsonl", long_context=long)},
            r"a.jsonl:2, long_context: 21\d\d prompt tokens \+ 5 new tokens",
        ),
        ({"data": triplets("b.jsonl", short_context=long)}, "b.jsonl:2, short_context"),
        ({"data": DataConfig(triplets="nowhere.jsonl")}, "nowhere.jsonl: no such file"),
        (
            {"data": DataConfig(needles=replace(NEEDLES, length=2100))},
            "long_context: .* exceed the model's limit of 2048",
        ),
        ({"model": ModelConfig(name="no/where/at/all")}, "no/where/at/all"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"evaluation": EvaluationConfig(sets=[far])}, "evaluation set far, .* exceed the model's limit of 2048"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            train(replace(config, **change))
        assert "\n" not in str(caught.value)
        assert not os.path.exists(config.run_dir)


def test_a_run_directory_holds_one_run(config):
    make_trainer(config)
    with pytest.raises(UserError, match="holds a run already"):
        make_trainer(config)
    with pytest.raises(UserError, match=r"started with optimizer.lr=0.001, now 0.01"):
        make_trainer(replace(config, resume="auto", optimizer=replace(config.optimizer, lr=0.01)))


def test_half_a_line_of_metrics_is_forgotten(config):
    trainer = make_trainer(config)
    trainer.step()
    trainer.save()
    with open(trainer.run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    again = make_trainer(replace(config, resume="auto"))
    assert [row["step"] for row in again.run.rows("metrics.jsonl")] == [1]
    assert json.loads((again.run.path / "metrics.jsonl").read_text())["step"] == 1
