"""Who the teacher is: the student itself, its initial weights, or a moving average of them."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from opsdl.config import RunConfig


class Teacher:
    """`model` scores the responses. It is the student itself for "live", a copy that never gets gradients otherwise."""

    def __init__(self, student: PreTrainedModel, initial: PreTrainedModel | None, config: RunConfig):
        """`initial` is given when the student's weights are no longer the initial ones (a resumed run)."""
        self.student, self.config = student, config.teacher
        if self.config.kind == "live":
            self.model = student
        else:
            self.model = (initial or copy.deepcopy(student)).requires_grad_(False).eval()
        if self.config.kind == "frozen":
            _cast_linear_weights(self.model, getattr(torch, config.model.compute_dtype))

    @property
    def head(self) -> torch.nn.Module | None:
        """The head, or None when it is the student's own: the loss then takes the exact shared-head gap."""
        return None if self.config.kind == "live" else self.model.get_output_embeddings()

    @torch.no_grad()
    def update(self) -> None:
        """After each optimizer step: an "ema" teacher moves towards the student."""
        if self.config.kind == "ema":
            for average, current in zip(self.model.parameters(), self.student.parameters(), strict=True):
                average.lerp_(current, 1 - self.config.ema_decay)


def _cast_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast once what autocast would cast in every forward; the head stays as it is, the loss takes it in float32."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.to(dtype)
