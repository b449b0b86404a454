"""What answers prompts: the protocol of a rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from opsdl.config import RolloutConfig
    from opsdl.data.prompts import Prompt
    from opsdl.training.groups import Rollout
    from opsdl.training.policy import Policy


class RolloutEngine(Protocol):
    """A sampler of responses from the student's policy."""

    def generate(self, prompts: Sequence[Prompt], sampling: RolloutConfig, seed: int) -> list[Rollout]:
        """Sample a group of responses to each prompt under its long context.

        Args:
            prompts: those of one step; consecutive ones over the same long context may share its prefill.
            sampling: group size, length, temperature and top_p.
            seed: the same seed, prompts and weights give the same responses.

        Raises:
            UserError: the model's logits are not finite.
        """
        ...

    def sync(self, student: Policy, step: int) -> None:
        """Take over the student's weights, which step `step` has changed."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...
