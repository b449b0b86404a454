"""What is minimised: the protocol of an objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from opsdl.config import RolloutConfig
    from opsdl.data.prompts import Prompt
    from opsdl.training.groups import Rollout
    from opsdl.training.policy import Policy
    from opsdl.training.rollout.engine import RolloutEngine


class LossOutput(NamedTuple):
    """The loss of some rollouts: a sum, which the loop divides by the count of all rollouts of the step."""

    total: Tensor  # scalar, with gradient
    statistics: dict[str, Tensor]  # of every response token, [N], without gradient; the metrics are their means


class Objective(Protocol):
    """A loss on rollouts. An implementation is a dataclass whose fields are the options that a config may give it."""

    needs_teacher: ClassVar[bool]  # False spares the memory of one
    phrase: ClassVar[str]  # what it minimises, in words, for reports

    def rollouts(
        self, engine: RolloutEngine, prompts: Sequence[Prompt], sampling: RolloutConfig, seed: int
    ) -> list[Rollout]:
        """Return the responses that the loss is on: sampled by the engine if the objective is on-policy, or stored."""
        ...

    def count(self, rollouts: Sequence[Rollout]) -> int:
        """Return what the step's loss is divided by, most often the number of response tokens."""
        ...

    def loss(self, student: Policy, teacher: Policy, rollouts: Sequence[Rollout]) -> LossOutput:
        """Return the loss of rollouts that share a long context; its backward runs before the next ones are asked for.

        Args:
            student: the policy that gets the gradient.
            teacher: the policy that scores; the student itself where the objective needs no teacher.
            rollouts: the groups of one long context.
        """
        ...
