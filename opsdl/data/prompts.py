"""The stream of training prompts: prompt i is the same whatever came before it, so a resumed run misses nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsdl.config import RunConfig
from opsdl.data.chat import check_length, encode_prompt
from opsdl.data.tasks.needles import make_needle
from opsdl.data.triplets import Triplet, read_triplets


@dataclass(frozen=True)
class Prompt:
    """A triplet as the student and the teacher read it: token ids [P_long] and [P_short]."""

    triplet: Triplet
    long_ids: Tensor
    short_ids: Tensor


def by_context(prompts: list[Prompt]) -> list[list[Prompt]]:
    """Consecutive prompts over the same long context, together."""
    return [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.triplet.long_context)]


def common_beginning(prompts: list[Prompt]) -> Tensor:
    """The token ids that the long prompts share at their beginning."""
    length = min(len(prompt.long_ids) for prompt in prompts)
    rows = torch.stack([prompt.long_ids[:length] for prompt in prompts])
    return rows[0, : int((rows == rows[0]).all(0).cumprod(0).sum())]


class Prompts:
    """Needle questions made on the fly, or the triplets of a file in a new random order each epoch.

    Raises UserError for anything wrong with a file of triplets, and for a prompt that with its response would not fit
    the model's context of `limit` tokens: a file is checked here as a whole, a needle question when it is made.
    """

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None, device: torch.device):
        self.config, self.tokenizer, self.limit, self.device = config, tokenizer, limit, device
        path = config.data.triplets
        self.file = [self._encode(triplet, place) for place, triplet in read_triplets(path)] if path else []

    def __getitem__(self, index: int) -> Prompt:
        if self.file:
            epoch, place = divmod(index, len(self.file))
            order = list(range(len(self.file)))
            random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
            return self.file[order[place]]
        triplet = make_needle(self.tokenizer, self.config.data.needles, self.config.seed, index)
        return self._encode(triplet, f"needle question {triplet.id}")

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of a step."""
        count = self.config.prompts_per_step
        return [self[step * count + i] for i in range(count)]

    def _encode(self, triplet: Triplet, where: str) -> Prompt:
        ids = []
        for name in ("long_context", "short_context"):
            tokens = encode_prompt(self.tokenizer, getattr(triplet, name), triplet.question, self.config.data.template)
            check_length(len(tokens), self.config.rollout.max_new_tokens, self.limit, f"{where}, {name}")
            ids.append(torch.tensor(tokens, device=self.device))
        return Prompt(triplet, *ids)
