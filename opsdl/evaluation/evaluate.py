"""The items of a task answered greedily under the long and the short context, and scored.

The accuracy under the long context is what OPSDL trains; the accuracy under the short context is its ceiling and must
not suffer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from opsdl.config import EvaluationConfig, EvaluationSet, build
from opsdl.data.chat import check_length, encode_prompt
from opsdl.data.tasks import TASKS, Task
from opsdl.data.triplets import Triplet
from opsdl.evaluation.results import EvaluationResult, Sample, SetResult
from opsdl.models import context_limit, eos_token_ids
from opsdl.prefix import generate, prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPLIT = "eval"  # what evaluation items are drawn from
SEED_OFFSET = 1_000_003  # the draws of an evaluation set are not those of a training set of the same seed
CONTEXTS = ("long_context", "short_context")


@dataclass(frozen=True)
class _Asked:
    """An evaluation set, its items, and the token ids of every long prompt, then of every short one."""

    name: str
    task: Task
    triplets: list[Triplet]
    prompts: list[list[int]]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationConfig,
    *,
    template: str,
    compute_dtype: str,
    seed: int,
    progress: bool = True,
) -> EvaluationResult:
    """Answer every item of every evaluation set twice, under its long and its short context, and score the answers.

    The items depend on the settings, the seed and the tokenizer only, so two calls with different weights are paired.
    The model decodes in eval mode and without gradient; the mode it came in is restored.

    Args:
        model: a causal LM.
        tokenizer: its own.
        settings: the keys under `evaluation` of a config.
        template: what the user turn of the chat holds, with {context} and {question}.
        compute_dtype: the dtype of matrix products, by autocast: "float32", "bfloat16" or "float16".
        seed: draws the items.
        progress: whether a bar is shown.

    Raises:
        UserError: a set's options are wrong, or a prompt with its response exceeds the model's positions; raised before
            any item is answered.
    """
    started = time.perf_counter()
    tasks = [build(TASKS, chosen.task, f"evaluation.sets[{index}]") for index, chosen in enumerate(settings.sets)]
    asked = [_ask(tokenizer, chosen, task, template, seed) for chosen, task in zip(settings.sets, tasks, strict=True)]
    _check_lengths(asked, settings.max_new_tokens, context_limit(model))
    total = sum(len(chosen.prompts) for chosen in asked)
    results = []
    with _inference(model, compute_dtype), tqdm(total=total, unit="prompt", disable=not progress) as bar:
        for chosen in asked:
            bar.set_description(f"evaluate {chosen.name}")
            results.append(_result(chosen, _answer(model, tokenizer, settings, chosen.prompts, bar)))
    return EvaluationResult(tuple(results), time.perf_counter() - started)


def _ask(tokenizer: PreTrainedTokenizerBase, chosen: EvaluationSet, task: Task, template: str, seed: int) -> _Asked:
    """Make the items of a set and their prompts."""
    triplets = [task.item(tokenizer, SPLIT, seed + SEED_OFFSET, index) for index in range(chosen.items)]
    prompts = [
        encode_prompt(tokenizer, getattr(triplet, context), triplet.question, template)
        for context in CONTEXTS
        for triplet in triplets
    ]
    return _Asked(chosen.name, task, triplets, prompts)


def _check_lengths(asked: Sequence[_Asked], max_new_tokens: int, limit: int | None) -> None:
    for chosen in asked:
        places = [(triplet.id, context) for context in CONTEXTS for triplet in chosen.triplets]
        for ids, (item, context) in zip(chosen.prompts, places, strict=True):
            check_length(len(ids), max_new_tokens, limit, f"evaluation set {chosen.name}, item {item}, {context}")


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationConfig,
    prompts: Sequence[list[int]],
    bar: tqdm,
) -> list[str]:
    """Decode the greedy response to each prompt, as text without special tokens; `batch_size` prompts at a time."""
    ends = eos_token_ids(model, tokenizer)
    texts = []
    for start in range(0, len(prompts), settings.batch_size):
        batch = prompts[start : start + settings.batch_size]
        prefixes = [prefill(model, torch.tensor(ids, device=model.device)) for ids in batch]
        answers = generate(
            model,
            prefixes,
            num_responses=1,
            max_new_tokens=settings.max_new_tokens,
            temperature=0.0,
            eos_token_id=ends,
        )
        for answer in answers:
            tokens = answer.tokens[0][answer.mask[0]].tolist()
            texts.append(str(tokenizer.decode(tokens, skip_special_tokens=True)).strip())
        bar.update(len(batch))
    return texts


def _result(asked: _Asked, texts: Sequence[str]) -> SetResult:
    """Score the texts, which are in the order of the prompts."""
    count = len(asked.triplets)
    samples = tuple(
        Sample(
            id=triplet.id,
            task=triplet.task,
            question=triplet.question,
            answers=triplet.answers,
            long_score=asked.task.score(long_text, triplet),
            short_score=asked.task.score(short_text, triplet),
            long_text=long_text,
            short_text=short_text,
        )
        for triplet, long_text, short_text in zip(asked.triplets, texts[:count], texts[count:], strict=True)
    )
    return SetResult(asked.name, asked.task.describe(), asked.task.length, samples)


@contextmanager
def _inference(model: PreTrainedModel, compute_dtype: str) -> Iterator[None]:
    """Eval mode, no gradient, and autocast to `compute_dtype` unless that is float32."""
    dtype, training = getattr(torch, compute_dtype), model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        model.train(training)
