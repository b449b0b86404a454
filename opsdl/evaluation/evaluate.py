"""Needle questions answered greedily under the long and the short context, and scored.

The accuracy under the long context is what OPSDL trains; the accuracy under the short context is its ceiling and must
not suffer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from opsdl.data.chat import check_length, encode_prompt
from opsdl.data.tasks.needles import make_needles
from opsdl.evaluation.scoring import accuracy, found
from opsdl.models import eos_token_ids
from opsdl.prefix import generate, prefill

if TYPE_CHECKING:
    from opsdl.config import EvaluationSet, RunConfig
    from opsdl.data.triplets import Triplet

SEED_OFFSET = 1_000_003  # the draws of an evaluation set are not those of a training set of the same seed


def evaluate(model: Any, tokenizer: Any, config: RunConfig, *, progress: bool = True) -> dict[str, Any]:
    """Answer every item of config.evaluation.sets twice, under its long and its short context. JSON-able:

        {"sets": [{"name", "length", "haystack", "kinds", "items",
                   "long": {"mean", "low", "high", "count"}, "short": {the same},
                   "by_task": {task: {"long": mean, "short": mean, "count"}},
                   "samples": [{"id", "task", "question", "answers",
                                "long_score", "short_score", "long_text", "short_text"}, one an item]}],
         "seconds": wall time}

    Decodes under autocast to config.model.compute_dtype, without gradient and in eval mode; the mode the model came in
    is restored. The items depend on the config and the tokenizer only, so two calls with different weights are paired.
    Raises UserError, before any item is answered, for a prompt that does not fit into the model's positions.
    """
    started = time.perf_counter()
    sets = [(s, make_needles(tokenizer, s.needles, s.items, config.seed + SEED_OFFSET)) for s in config.evaluation.sets]
    prompts = [_prompts(model, tokenizer, config, chosen.name, triplets) for chosen, triplets in sets]
    total = sum(map(len, prompts))
    results = []
    with _inference(model, config.model.compute_dtype), tqdm(total=total, unit="prompt", disable=not progress) as bar:
        for (chosen, triplets), ids in zip(sets, prompts, strict=True):
            bar.set_description(f"evaluate {chosen.name}")
            texts = _answer(model, tokenizer, config, ids, bar)
            results.append(_summary(chosen, triplets, texts[: len(triplets)], texts[len(triplets) :]))
    return {"sets": results, "seconds": time.perf_counter() - started}


def _prompts(model: Any, tokenizer: Any, config: RunConfig, name: str, triplets: Sequence[Triplet]) -> list[list[int]]:
    """Token ids of every long prompt, then of every short one; all are known to fit."""
    prompts = []
    for context in ("long_context", "short_context"):
        for triplet in triplets:
            ids = encode_prompt(tokenizer, getattr(triplet, context), triplet.question, config.data.template)
            where = f"evaluation set {name}, item {triplet.id}, {context}"
            limit = getattr(model.config, "max_position_embeddings", None)
            check_length(len(ids), config.evaluation.max_new_tokens, limit, where)
            prompts.append(ids)
    return prompts


def _answer(model: Any, tokenizer: Any, config: RunConfig, prompts: Sequence[list[int]], bar: tqdm) -> list[str]:
    """The greedy response to each prompt, as text without special tokens; evaluation.batch_size prompts at a time."""
    eos, size = eos_token_ids(model, tokenizer), config.evaluation.batch_size
    texts = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        caches = [prefill(model, torch.tensor(ids, device=model.device)) for ids in batch]
        answers = generate(
            model,
            caches,
            num_responses=1,
            max_new_tokens=config.evaluation.max_new_tokens,
            temperature=0.0,
            eos_token_id=eos,
        )
        for answer in answers:
            tokens = answer.tokens[0][answer.mask[0]].tolist()
            texts.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
        bar.update(len(batch))
    return texts


def _summary(
    chosen: EvaluationSet, triplets: Sequence[Triplet], long_texts: Sequence[str], short_texts: Sequence[str]
) -> dict[str, Any]:
    samples = [
        {
            "id": triplet.id,
            "task": triplet.task,
            "question": triplet.question,
            "answers": list(triplet.answers),
            "long_score": found(long_text, triplet.answers),
            "short_score": found(short_text, triplet.answers),
            "long_text": long_text,
            "short_text": short_text,
        }
        for triplet, long_text, short_text in zip(triplets, long_texts, short_texts, strict=True)
    ]
    return {
        "name": chosen.name,
        "length": chosen.needles.length,
        "haystack": chosen.needles.haystack,
        "kinds": list(chosen.needles.kinds),
        "items": len(samples),
        "long": asdict(accuracy([sample["long_score"] for sample in samples])),
        "short": asdict(accuracy([sample["short_score"] for sample in samples])),
        "by_task": _by_task(samples),
        "samples": samples,
    }


def _by_task(samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    tasks: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        tasks.setdefault(sample["task"], []).append(sample)
    return {
        task: {
            "long": statistics.fmean(sample["long_score"] for sample in members),
            "short": statistics.fmean(sample["short_score"] for sample in members),
            "count": len(members),
        }
        for task, members in tasks.items()
    }


@contextmanager
def _inference(model: Any, compute_dtype: str) -> Iterator[None]:
    """Eval mode, no gradient, and autocast to `compute_dtype` unless that is float32."""
    dtype, training = getattr(torch, compute_dtype), model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        model.train(training)
