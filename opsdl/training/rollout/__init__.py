"""Rollout engines by the name that `rollout.engine` gives them in a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opsdl.training.policy import Policy
from opsdl.training.rollout.builtin import BuiltinEngine
from opsdl.training.rollout.engine import RolloutEngine

ENGINES: dict[str, Callable[[Policy, Iterable[int]], RolloutEngine]] = {"builtin": BuiltinEngine}
