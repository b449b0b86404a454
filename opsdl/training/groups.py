"""A group of responses to one prompt, as it goes from the rollout engine to the objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsdl.data.prompts import Prompt
    from opsdl.prefix import PrefixCache, Responses


@dataclass
class Rollout:
    """A group: a prompt and the G responses to it under its long context."""

    prompt: Prompt
    responses: Responses
    prefix: PrefixCache | None = None  # of the long prompt, where the engine has one that the student can go on from

    def take_prefix(self) -> PrefixCache | None:
        """Return the prefix and let go of it."""
        prefix, self.prefix = self.prefix, None
        return prefix


def take_by_context(rollouts: list[Rollout]) -> Iterator[list[Rollout]]:
    """Empty the list, consecutive rollouts over the same long context at a time."""
    sizes = [len(list(same)) for _, same in groupby(rollouts, key=lambda rollout: rollout.prompt.triplet.long_context)]
    for size in sizes:
        yield [rollouts.pop(0) for _ in range(size)]
