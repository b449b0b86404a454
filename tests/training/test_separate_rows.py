"""A training run over shared prefixes against the same run over separate rows, step by step, in float64."""

from dataclasses import replace

import pytest
import torch

from opsdl.prefix import detach
from opsdl.training.loop import Trainer
from tests.support.models import separate_rows
from tests.training.test_loop import config, make_trainer  # noqa: F401  a fixture

STEPS = 20
ROUNDING = 1e-6  # transformers' norms and rotary embedding are float32 inside


class SeparateRows(Trainer):
    """The loop without sharing: an ordinary forward of prompt and response for every row of student and teacher."""

    recorded: list

    def rollout(self, batch):
        return [None] * len(batch), self.recorded[self.done]

    def student_hidden(self, prompts, caches, groups):
        return self.rows(self.student, [p.long_ids for p in prompts], groups)

    @torch.no_grad()
    def teacher_hidden(self, prompts, groups):
        return self.rows(self.teacher.model, [p.short_ids for p in prompts], groups)

    @staticmethod
    def rows(model, prompts, groups):
        detach(model)
        pairs = zip(prompts, groups, strict=True)
        return torch.cat([separate_rows(model, ids, group)[group.mask] for ids, group in pairs])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["prefill's graph", "activation checkpointing"])
def test_twenty_steps_equal_those_of_separate_rows(checkpointing, config, tmp_path):  # noqa: F811
    settings = replace(
        config,
        steps=STEPS,
        data=replace(config.data, needles=replace(config.data.needles, questions=2)),
        model=replace(config.model, compute_dtype="float32", activation_checkpointing=checkpointing),
    )
    trainers = []
    for index, kind in enumerate((Trainer, SeparateRows)):
        trainer = make_trainer(replace(settings, run_dir=str(tmp_path / str(index))))
        trainer.student.double()
        trainer.teacher.model.double()
        if trainer.teacher.head is not None:
            trainer.teacher.head.double()
        trainer.optimizer = torch.optim.AdamW(trainer.student.parameters(), lr=1e-3)
        trainer.__class__ = kind
        trainers.append(trainer)
    shared, separate = trainers
    separate.recorded, rollout = [], shared.rollout

    def record(batch):
        prefixes, groups = rollout(batch)
        separate.recorded.append(groups)
        return prefixes, groups

    shared.rollout = record
    for _ in range(STEPS):
        mine, theirs = shared.step(), separate.step()
        assert mine["loss"] > 0
        for name in ("loss", "kl", "grad_norm"):
            assert abs(mine[name] - theirs[name]) <= ROUNDING * abs(theirs[name]), name
    for (name, x), y in zip(shared.student.named_parameters(), separate.student.parameters(), strict=True):
        assert (x - y).norm() <= ROUNDING * y.norm(), name
