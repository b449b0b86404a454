"""The training loop: on-policy self-distillation for long contexts (arXiv 2604.17535, algorithm 1).

A triplet is a long context C_L, a short context C_S inside it that holds the evidence, and a question Q about it.

    for the triplets of a step
        y      ~ student( . | C_L, Q)            the student answers under the long context, a group of responses each
        p, q   = student(y | C_L, Q), teacher(y | C_S, Q)
        loss   = mean over response tokens of KL(p || q): the teacher sees only the page, the student the whole book
        an optimizer step for the student; the teacher and the rollout engine follow

What is minimised is an objective (objectives/), who answers a rollout engine (rollout/), who teaches a teacher
(teacher.py). This file knows only in which order they take their turns. A run is put together in run.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from opsdl.config import RunConfig
from opsdl.data.prompts import Prompts
from opsdl.errors import UserError
from opsdl.training.checkpoint import Checkpoints
from opsdl.training.groups import take_by_context
from opsdl.training.log import StepLog, brief
from opsdl.training.monitor import interrupt_after_step
from opsdl.training.objectives.base import Objective
from opsdl.training.optimizer import Optimizer
from opsdl.training.parallel import Parallel
from opsdl.training.policy import Policy
from opsdl.training.rollout.engine import RolloutEngine
from opsdl.training.teacher import Teacher


@dataclass
class Loop:
    """The parts of a run, and how many steps of it are done."""

    config: RunConfig
    prompts: Prompts
    engine: RolloutEngine
    objective: Objective
    student: Policy
    teacher: Teacher
    optimizer: Optimizer
    parallel: Parallel
    log: StepLog
    checkpoints: Checkpoints
    done: int = 0

    def run(self) -> None:
        """Make the steps that are left, with a checkpoint when one is due, at the end, and before an interruption."""
        with (
            interrupt_after_step() as interrupted,
            tqdm(total=self.config.steps, initial=self.done, unit="step", desc="train") as bar,
        ):
            while self.done < self.config.steps:
                metrics = self.step()
                bar.set_postfix(brief(metrics))
                bar.update()
                if interrupted or self.done == self.config.steps or self.done % self.config.checkpoint_every == 0:
                    self.save()
                if interrupted:
                    raise KeyboardInterrupt

    def step(self) -> dict[str, Any]:
        """Make one optimizer step over `prompts_per_step` prompts. Returns and logs its metrics."""
        self.log.begin()
        prompts = self.parallel.local(self.prompts.batch(self.done))
        try:
            rollouts = self.objective.rollouts(self.engine, prompts, self.config.rollout, self.seed())
        except UserError as error:
            raise self.broken(str(error)) from None
        count = self.parallel.sum(self.objective.count(rollouts))
        self.log.sampled(rollouts, count)
        for group in take_by_context(rollouts):
            out = self.objective.loss(self.student, self.teacher, group)
            (out.total * self.parallel.gradient_scale() / count).backward()
            self.log.add(out)
        norm = self.optimizer.clip()
        if not (math.isfinite(self.log.loss) and math.isfinite(norm)):
            raise self.broken(f"the loss is {self.log.loss}, its gradient's norm {norm}; expected finite numbers")
        self.optimizer.step(self.done)
        self.teacher.update(self.student)
        self.engine.sync(self.student, self.done)
        self.done += 1
        lr, device = self.optimizer.lr(self.done - 1), self.student.model.device
        return self.log.write(self.done, grad_norm=norm, lr=lr, device=device)

    def seed(self) -> int:
        """The seed of this step's rollouts: of (seed, step) alone, so that a resumed run samples what it would have."""
        return self.config.seed * 1_000_003 + self.done

    def save(self) -> None:
        """Write a checkpoint of the steps done."""
        self.checkpoints.save(self.done, self.student.model, self.optimizer.adamw, self.teacher.state)

    def broken(self, what: str) -> UserError:
        """The error of a step that was not made."""
        return UserError(
            f"step {self.done + 1}: {what}. The last checkpoint, {self.checkpoints.newest or 'none'}, is as it was; try"
            " a lower optimizer.lr"
        )
