"""The built-in rollout engine: the student's own model decodes, every response of a prompt from one prefill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from opsdl.data.prompts import by_context
from opsdl.prefix import generate
from opsdl.training.groups import Rollout

if TYPE_CHECKING:
    from opsdl.config import RolloutConfig
    from opsdl.data.prompts import Prompt
    from opsdl.training.policy import Policy


class BuiltinEngine:
    """Decodes with the student's own weights, so there is nothing to synchronise.

    Args:
        student: the policy that is trained.
        ends: the token ids that end a response.
    """

    def __init__(self, student: Policy, ends: Iterable[int]):
        self.student, self.ends = student, list(ends)

    def generate(self, prompts: Sequence[Prompt], sampling: RolloutConfig, seed: int) -> list[Rollout]:
        generator = torch.Generator(self.student.model.device).manual_seed(seed)
        prefixes = [cache for same in by_context(prompts) for cache in self.student.prefill(same)]
        with self.student.autocast():
            groups = generate(
                self.student.model,
                prefixes,
                num_responses=sampling.group_size,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                eos_token_id=self.ends,
                generator=generator,
            )
        return [Rollout(*of_one) for of_one in zip(prompts, groups, prefixes, strict=True)]

    def sync(self, student: Policy, step: int) -> None:
        pass

    def close(self) -> None:
        pass
