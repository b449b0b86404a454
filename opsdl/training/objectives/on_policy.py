"""What all on-policy objectives share: the engine samples the responses, and their tokens are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsdl.config import RolloutConfig
    from opsdl.data.prompts import Prompt
    from opsdl.training.groups import Rollout
    from opsdl.training.rollout.engine import RolloutEngine


class OnPolicy:
    """The student's own responses to each prompt; the loss is a mean over their tokens."""

    def rollouts(
        self, engine: RolloutEngine, prompts: Sequence[Prompt], sampling: RolloutConfig, seed: int
    ) -> list[Rollout]:
        return engine.generate(prompts, sampling, seed)

    def count(self, rollouts: Sequence[Rollout]) -> int:
        return sum(sum(rollout.responses.lengths) for rollout in rollouts)
