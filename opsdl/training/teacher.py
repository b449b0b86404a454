"""Who the teacher is: the student itself, its initial weights, or a moving average of its weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PreTrainedModel

from opsdl.training.policy import Policy

if TYPE_CHECKING:
    from opsdl.config import RunConfig


class Teacher(Policy):
    """A policy that scores responses and never gets a gradient.

    Args:
        student: the policy that is trained.
        initial: the initial weights; None where the student still has them.
        config: the run's.
    """

    phrase: ClassVar[str]  # who it is, for reports
    state: PreTrainedModel | None = (
        None  # the weights that a checkpoint must hold, where the student's do not give them
    )

    def __init__(self, student: Policy, initial: PreTrainedModel | None, config: RunConfig):
        super().__init__(self.weights(student.model, initial), config, "teacher", student.clock)

    def weights(self, student: PreTrainedModel, initial: PreTrainedModel | None) -> PreTrainedModel:
        """Return the model at the start: a copy of the initial weights without gradients."""
        return (initial or copy.deepcopy(student)).requires_grad_(False).eval()

    def update(self, student: Policy) -> None:
        """Follow the student, after each optimizer step."""


class LiveTeacher(Teacher):
    """The student itself, as it is at each step. It has the student's head, so the loss takes the exact gap."""

    phrase = "the student's own current weights"

    def weights(self, student: PreTrainedModel, initial: PreTrainedModel | None) -> PreTrainedModel:
        return student


class FrozenTeacher(Teacher):
    """The initial weights. Linear layers are cast once to what autocast would cast them to in every forward."""

    phrase = "the frozen initial weights"

    def __init__(self, student: Policy, initial: PreTrainedModel | None, config: RunConfig):
        super().__init__(student, initial, config)
        head = self.model.get_output_embeddings()  # stays as it is: the losses have a dtype of their own
        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                module.to(self.compute_dtype)


class EmaTeacher(Teacher):
    """A moving average: average = decay average + (1 - decay) student, once a step."""

    phrase = "a moving average of the student's weights"

    def __init__(self, student: Policy, initial: PreTrainedModel | None, config: RunConfig):
        super().__init__(student, initial, config)
        self.state, self.decay = self.model, config.teacher.ema_decay

    @torch.no_grad()
    def update(self, student: Policy) -> None:
        for average, current in zip(self.model.parameters(), student.model.parameters(), strict=True):
            average.lerp_(current, 1 - self.decay)


TEACHERS: dict[str, type[Teacher]] = {"frozen": FrozenTeacher, "live": LiveTeacher, "ema": EmaTeacher}
