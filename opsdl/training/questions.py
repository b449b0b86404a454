"""The model as the writer of its own training questions, for triplets from raw documents (opsdl/data/prepare.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from opsdl.data.chat import check_length, encode_prompt
from opsdl.models import context_limit
from opsdl.prefix import generate, prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ASK = "Write one question that can be answered from the text above."
# LongPO, whose pipeline the paper follows, samples its questions this way.
TEMPERATURE, TOP_P, MAX_NEW_TOKENS = 0.7, 0.9, 64


def self_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
) -> Callable[[str], list[str]]:
    """Make a model ask questions about texts, for `opsdl.data.prepare.prepare`.

    Args:
        model: the one that is to be trained.
        tokenizer: its own.
        seed: calls advance one random generator, so the n-th call of a seed repeats.

    Returns:
        A callable from a short context to at most one sampled question: the first line of the response that ends in a
        question mark. It raises UserError for a short context that does not fit the model.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)

    def questions(short_context: str) -> list[str]:
        ids = encode_prompt(tokenizer, short_context, ASK, "{context}\n\n{question}")
        check_length(len(ids), MAX_NEW_TOKENS, context_limit(model), "prepare: a short context")
        (responses,) = generate(
            model,
            [prefill(model, torch.tensor(ids, device=model.device))],
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            eos_token_id=tokenizer.eos_token_id,
            generator=generator,
        )
        text = str(tokenizer.decode(responses.tokens[0][responses.mask[0]].tolist(), skip_special_tokens=True))
        return [line.strip() for line in text.splitlines() if line.strip().endswith("?")][:1]

    return questions
