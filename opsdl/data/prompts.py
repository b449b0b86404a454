"""The stream of training prompts: prompt i is the same whatever came before it, so a resumed run misses nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opsdl.config import DataConfig, build
from opsdl.data.chat import check_length, encode_prompt
from opsdl.data.extract import EXTRACTORS
from opsdl.data.tasks import TASKS, Task, found
from opsdl.data.triplets import Placed, Triplet, read_triplets
from opsdl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT = "train"  # what the prompts of a task are drawn from


@dataclass(frozen=True)
class Prompt:
    """A triplet as the student and the teacher read it: token ids [P_long] and [P_short], int64.

    `task` is what made the triplet; None for one from a file.
    """

    triplet: Triplet
    long_ids: Tensor
    short_ids: Tensor
    task: Task | None = None

    def score(self, text: str) -> float | None:
        """Judge a response, from 0 (wrong) to 1 (right); None where nobody knows the answers."""
        if self.task is not None:
            return self.task.score(text, self.triplet)
        return found(text, self.triplet.answers) if self.triplet.answers else None


def by_context(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Group consecutive prompts over the same long context."""
    return [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.triplet.long_context)]


def common_beginning(prompts: Sequence[Prompt]) -> Tensor:
    """Cut out the token ids that the long prompts share at their beginning, [P] int64."""
    length = min(len(prompt.long_ids) for prompt in prompts)
    ids_QP = torch.stack([prompt.long_ids[:length] for prompt in prompts])  # Q prompts
    return ids_QP[0, : int((ids_QP == ids_QP[0]).all(0).cumprod(0).sum())]


def open_source(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Task | list[Placed]:
    """Open what a config draws its prompts from: the triplets of its file, or else its task.

    Args:
        data: the keys under `data`.
        tokenizer: counts the tokens of short contexts that data.extractor finds.

    Raises:
        UserError: the file, the task's options or the extractor are wrong.
    """
    if data.triplets is None:
        return build(TASKS, data.task, "data")
    if data.extractor is None:
        return read_triplets(data.triplets)
    if data.extractor not in EXTRACTORS:
        raise UserError(f"config: key data.extractor is {data.extractor!r}; expected one of {', '.join(EXTRACTORS)}")
    extractor = EXTRACTORS[data.extractor](tokenizer)
    return read_triplets(
        data.triplets, lambda long_context, question: extractor.extract(long_context, question, data.extract_tokens)
    )


class Prompts:
    """The items of a task, or the triplets of a file in a new random order each epoch.

    Args:
        source: what `open_source` gives.
        tokenizer: the model's.
        template: what the user turn of the chat holds, with {context} and {question}.
        limit: tokens that the model has positions for; None when it states no limit.
        max_new_tokens: tokens of a response, at most.
        device: where the token ids go.
        seed: draws the items of a task, and the order of a file.
        prompts_per_step: prompts of one batch.

    Raises:
        UserError: a prompt would with its response exceed `limit`; a file is checked here as a whole, the item of a
            task when it is made.
    """

    def __init__(
        self,
        source: Task | list[Placed],
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str,
        limit: int | None,
        max_new_tokens: int,
        device: torch.device,
        seed: int,
        prompts_per_step: int,
    ):
        self.tokenizer, self.template, self.device = tokenizer, template, device
        self.limit, self.max_new_tokens = limit, max_new_tokens
        self.seed, self.prompts_per_step = seed, prompts_per_step
        self.task = None if isinstance(source, list) else source
        self.file = [self._encode(triplet, place) for place, triplet in source] if isinstance(source, list) else []

    def __getitem__(self, index: int) -> Prompt:
        """Give prompt `index` of the stream, which has no end."""
        if self.task is not None:
            triplet = self.task.item(self.tokenizer, SPLIT, self.seed, index)
            return self._encode(triplet, f"item {triplet.id}")
        epoch, place = divmod(index, len(self.file))
        order = list(range(len(self.file)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return self.file[order[place]]

    def batch(self, step: int) -> list[Prompt]:
        """Give the prompts of a step, counted from 0."""
        start = step * self.prompts_per_step
        return [self[index] for index in range(start, start + self.prompts_per_step)]

    def _encode(self, triplet: Triplet, where: str) -> Prompt:
        long_ids, short_ids = (self._ids(triplet, name, where) for name in ("long_context", "short_context"))
        return Prompt(triplet, long_ids, short_ids, self.task)

    def _ids(self, triplet: Triplet, name: str, where: str) -> Tensor:
        tokens = encode_prompt(self.tokenizer, getattr(triplet, name), triplet.question, self.template)
        check_length(len(tokens), self.max_new_tokens, self.limit, f"{where}, {name}")
        return torch.tensor(tokens, device=self.device)
