"""The loop on a tiny model and real text: what it learns from, what it refuses, and that nothing is left to chance."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from opsdl.config import Chosen, DataConfig, OptimizerConfig, TeacherConfig, positive
from opsdl.data.tasks.needles import Needles
from opsdl.data.triplets import write_triplets
from opsdl.errors import UserError
from opsdl.training.objectives import OBJECTIVES
from opsdl.training.objectives.base import LossOutput
from opsdl.training.objectives.on_policy import OnPolicy
from opsdl.training.run import train
from tests.support.training import NEEDLES, RecordedEngine, make_loop


def weights(loop):
    return {name: parameter.detach().clone() for name, parameter in loop.student.model.named_parameters()}


def test_equal_contexts_give_no_kl_and_no_gradient(config, tokenizer, tmp_path):
    items = [Needles(**NEEDLES).item(tokenizer, "train", 0, index) for index in range(4)]
    write_triplets(tmp_path / "same.jsonl", [replace(item, short_context=item.long_context) for item in items])
    same = replace(
        config,
        data=DataConfig(triplets=str(tmp_path / "same.jsonl")),
        model=replace(config.model, compute_dtype="float32"),
        teacher=TeacherConfig(kind="live"),
    )
    metrics = make_loop(same).step()
    assert 0 <= metrics["kl"] < 1e-9 and metrics["grad_norm"] < 1e-5
    different = make_loop(replace(config, run_dir=str(tmp_path / "other"))).step()
    assert different["kl"] > 1e-4 and different["grad_norm"] > 1e-3


@pytest.mark.parametrize("kind", ["frozen", "live", "ema"])
@pytest.mark.parametrize("loss", [Chosen("full"), Chosen("policy"), Chosen("policy", {"baseline": "kl"})], ids=str)
def test_teachers_and_objectives(config, kind, loss):
    loop = make_loop(replace(config, teacher=TeacherConfig(kind, ema_decay=0.9), loss=loss))
    initial = weights(loop)
    for _ in range(2):
        assert math.isfinite(loop.step()["loss"])
    moved = {name: value - initial[name] for name, value in weights(loop).items()}
    assert all(change.abs().max() > 0 for change in moved.values())
    assert (loop.teacher.model is loop.student.model) == (kind == "live")
    for name, parameter in loop.teacher.model.named_parameters():
        if kind == "frozen":
            # Linear layers are kept as autocast would cast them.
            assert torch.equal(parameter, initial[name].to(parameter.dtype))
            assert not parameter.requires_grad and parameter.grad is None
        if kind == "ema":
            assert 0 < (parameter - initial[name]).norm() < 0.3 * moved[name].norm()


def test_activation_checkpointing_and_packed_stream_give_the_same_step(config, tmp_path):
    norms = []
    for i, checkpointing in enumerate((False, True)):
        model = replace(config.model, activation_checkpointing=checkpointing, compute_dtype="float32")
        loop = make_loop(replace(config, model=model, run_dir=str(tmp_path / str(i))))
        norms.append(loop.step()["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_distillation_closes_the_gap(config):
    """Twenty steps on two fixed prompts: the KL to the frozen teacher must fall, or nothing is learnt."""
    settings = replace(config, steps=20, checkpoint_every=100, optimizer=OptimizerConfig(lr=3e-3, warmup_steps=1))
    loop = make_loop(settings)
    fixed = loop.prompts.batch(0)
    loop.prompts.batch = lambda step: fixed
    kls = [loop.step()["kl"] for _ in range(20)]
    assert sum(kls[-3:]) < 0.5 * sum(kls[:3])


def test_every_step_samples_anew_from_its_prompts(config):
    """Two steps over the same prompts with the same weights give other responses; the same step gives the same ones."""
    loop = make_loop(
        replace(config, optimizer=OptimizerConfig(lr=1e-30), rollout=replace(config.rollout, temperature=2))
    )
    fixed = loop.prompts.batch(0)
    loop.prompts.batch = lambda step: fixed
    sampled, real = [], loop.engine.generate

    def recorded(*arguments):
        rollouts = real(*arguments)
        sampled.append([rollout.responses.tokens.tolist() for rollout in rollouts])
        return rollouts

    loop.engine.generate = recorded
    loop.step(), loop.step()
    loop.done = 1
    loop.step()
    assert sampled[0] != sampled[1] and sampled[1] == sampled[2]
    first, second = sampled[0]
    assert first != second and len({tuple(response) for response in first}) > 1
    other = make_loop(replace(config, run_dir=config.run_dir + "-other", seed=1))
    loop.done = 0
    assert other.seed() != loop.seed()


def test_a_step_holds_no_prefix_after_its_backward(config):
    loop = make_loop(config)
    seen, real = [], loop.objective.loss

    def watched(student, teacher, rollouts):
        out = real(student, teacher, rollouts)
        seen.extend(rollouts)
        return out

    loop.objective.loss = watched
    loop.step()
    assert len(seen) == config.prompts_per_step and all(rollout.prefix is None for rollout in seen)


@dataclass
class Half(OnPolicy):
    """A toy objective: half the negative log-likelihood of the responses, times an option."""

    factor: float = positive(1.0)
    needs_teacher: ClassVar[bool] = False
    phrase: ClassVar[str] = "half the negative log-likelihood"

    def loss(self, student, teacher, rollouts):
        tokens_N = torch.cat([rollout.responses.packed_tokens for rollout in rollouts])
        logits_NV = student.hidden(rollouts, "long", gradient=True) @ student.head.weight.T
        nll_N = -0.5 * self.factor * logits_NV.log_softmax(-1).gather(1, tokens_N[:, None])[:, 0]
        return LossOutput(nll_N.sum(), {"nll": nll_N.detach()})


def test_an_added_objective_is_one_line_in_a_table(config, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "half", Half)
    loop = make_loop(replace(config, loss=Chosen("half", {"factor": 2.0})))
    assert loop.teacher.model is loop.student.model  # no memory for one that nobody asks
    metrics = loop.step()
    assert metrics["loss"] == pytest.approx(metrics["nll"]) and 1 < metrics["loss"] < 20
    for options, message in (
        ({"facto": 2.0}, "unknown key loss.facto; the nearest valid key is loss.factor"),
        ({"factor": 0.0}, "key loss.factor is 0.0; expected a positive number"),
    ):
        with pytest.raises(UserError, match=message):
            train(replace(config, loss=Chosen("half", options), run_dir=config.run_dir + "-refused"))


@pytest.mark.parametrize("kind", ["full", "policy"])
def test_a_loss_that_is_not_a_number_stops_before_the_weights(kind, config):
    loop = make_loop(replace(config, loss=Chosen(kind)))
    loop.step()
    loop.save()
    saved, before, real = load_file(loop.checkpoints.newest / "model.safetensors"), weights(loop), loop.objective.loss

    def broken(*arguments):
        total, stats = real(*arguments)
        return LossOutput(total * torch.nan, stats)

    loop.objective.loss = broken
    with pytest.raises(UserError, match=r"step 2: the loss is nan, .* last checkpoint, .*step-00001, is as it was"):
        loop.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(loop).items())
    again = load_file(loop.checkpoints.newest / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.items())


def test_a_gradient_that_is_not_a_number_stops_too(config):
    loop = make_loop(config)
    hook = loop.student.model.get_output_embeddings().weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(
        UserError, match="step 1: the loss is .*, its gradient's norm (nan|inf); .* checkpoint, none, is"
    ):
        loop.step()
    hook.remove()


def test_the_engine_follows_the_student(config):
    loop = make_loop(config)
    fixed = loop.prompts.batch(0)
    groups = [rollout.responses for rollout in loop.engine.generate(fixed, config.rollout, 0)]
    loop.engine = RecordedEngine([groups, groups])
    loop.prompts.batch = lambda step: fixed
    first, second = loop.step(), loop.step()
    assert loop.engine.synced == [0, 1] and loop.engine.seeds == [0, 1]
    assert first["response_length"] == second["response_length"]


def test_metrics_are_means_over_all_response_tokens(config):
    loop = make_loop(config)
    prompts = loop.prompts.batch(0)
    groups = [rollout.responses for rollout in loop.engine.generate(prompts, config.rollout, 3)]
    tokens = sum(sum(group.lengths) for group in groups)
    loop.engine, sums = RecordedEngine([groups]), {"kl": 0.0, "entropy": 0.0}
    real = loop.objective.loss

    def watched(*arguments):
        out = real(*arguments)
        assert all(
            len(values) == sum(sum(r.responses.lengths) for r in arguments[2]) for values in out.statistics.values()
        )
        for name in sums:
            sums[name] += float(out.statistics[name].sum())
        return out

    loop.objective.loss = watched
    metrics = loop.step()
    assert metrics["response_length"] == tokens / 6
    for name, value in sums.items():
        assert metrics[name] == pytest.approx(value / tokens)
    seconds = sum(value for name, value in metrics.items() if name.startswith("seconds_"))
    read = sum(len(prompt.long_ids) for prompt in prompts) + tokens
    assert metrics["tokens_per_second"] == pytest.approx(read / seconds)
