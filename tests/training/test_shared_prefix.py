"""A training run over shared prefixes against the same run over separate rows, step by step, in float64."""

from dataclasses import replace

import pytest
import torch

from opsdl.config import Chosen
from opsdl.prefix import detach
from opsdl.training.policy import Policy, context_ids
from opsdl.training.teacher import FrozenTeacher
from tests.support.models import separate_rows
from tests.support.training import NEEDLES, RecordedEngine, make_loop

STEPS = 20
ROUNDING = 1e-6  # transformers' norms and rotary embedding are float32 inside


class SeparateRows:
    """A policy without sharing: an ordinary forward of prompt and response for every response."""

    def hidden(self, rollouts, context, *, gradient):
        detach(self.model)
        with torch.set_grad_enabled(gradient):
            hidden = [
                separate_rows(self.model, context_ids(r.prompt, context), r.responses)[r.responses.mask]
                for r in rollouts
            ]
        self.clock.lap(self.name)
        return torch.cat(hidden)


class SeparateStudent(SeparateRows, Policy):
    pass


class SeparateTeacher(SeparateRows, FrozenTeacher):
    pass


def in_float64(loop):
    loop.student.model.double(), loop.teacher.model.double()
    loop.optimizer.adamw = torch.optim.AdamW(loop.student.model.parameters(), lr=1e-3)
    return loop


@pytest.mark.parametrize("checkpointing", [False, True], ids=["prefill's graph", "activation checkpointing"])
def test_twenty_steps_equal_those_of_separate_rows(checkpointing, config, tmp_path):
    settings = replace(
        config,
        steps=STEPS,
        data=replace(config.data, task=Chosen("needles", {**NEEDLES, "questions": 2})),
        model=replace(config.model, compute_dtype="float32", activation_checkpointing=checkpointing),
    )
    shared, separate = (in_float64(make_loop(replace(settings, run_dir=str(tmp_path / name)))) for name in "ab")
    separate.student = SeparateStudent(separate.student.model, settings, "student", separate.log.clock)
    separate.teacher = SeparateTeacher(separate.student, separate.teacher.model, settings)
    separate.teacher.model.double()  # a frozen teacher begins by casting
    separate.engine, generate = RecordedEngine([]), shared.engine.generate

    def recorded(*arguments):
        rollouts = generate(*arguments)
        separate.engine.steps.append([rollout.responses for rollout in rollouts])
        return rollouts

    shared.engine.generate = recorded
    for _ in range(STEPS):
        mine, theirs = shared.step(), separate.step()
        assert mine["loss"] > 0
        for name in ("loss", "kl", "grad_norm"):
            assert abs(mine[name] - theirs[name]) <= ROUNDING * abs(theirs[name]), name
    for (name, x), y in zip(shared.student.model.named_parameters(), separate.student.model.parameters(), strict=True):
        assert (x - y).norm() <= ROUNDING * y.norm(), name
