"""AdamW with a linear warm-up and a limit on the gradient's norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from opsdl.config import OptimizerConfig


class Optimizer:
    """AdamW over `parameters`, with the settings of a config."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerConfig):
        self.settings, self.parameters = settings, list(parameters)
        betas = (settings.beta1, settings.beta2)
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay, fused=True
        )

    def lr(self, step: int) -> float:
        """Return the learning rate of step `step`, the first of which is 0."""
        return self.settings.lr * min(1.0, (step + 1) / max(self.settings.warmup_steps, 1))

    def clip(self) -> float:
        """Scale the gradient down to the largest norm allowed. Returns the norm before."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))

    def step(self, step: int) -> None:
        """Move the parameters, and forget the gradient."""
        self.adamw.param_groups[0]["lr"] = self.lr(step)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
