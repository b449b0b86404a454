"""Objectives by the name that `loss.kind` gives them in a config."""

from __future__ import annotations

from opsdl.training.objectives.base import LossOutput, Objective
from opsdl.training.objectives.full import FullReverseKL
from opsdl.training.objectives.policy import PolicyReverseKL

__all__ = ["OBJECTIVES", "LossOutput", "Objective"]

OBJECTIVES: dict[str, type[Objective]] = {"full": FullReverseKL, "policy": PolicyReverseKL}
