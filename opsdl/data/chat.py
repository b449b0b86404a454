"""A context and a question as the prompt of a chat model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast, overload

from opsdl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, context: str, question: str, template: str) -> list[int]:
    """Encode a context and a question as one user turn, ready for the assistant's answer.

    Nothing is truncated, and the texts go in verbatim: braces in them mean nothing.

    Args:
        tokenizer: an instruct model's, with a chat template.
        context: the long or the short context.
        question: what is asked about it.
        template: what the user turn holds, with {context} and {question} once each: "{context}\\n\\n{question}".

    Returns:
        The token ids.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path or '(unnamed)'}: has no chat template; expected an instruct model's"
        )
    # The question first fills a template without context: a context that happens to say "{question}" stays as it is.
    before, after = (part.replace("{question}", question) for part in template.split("{context}"))
    message = {"role": "user", "content": before + context + after}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return _encode(tokenizer, cast(str, text))  # the chat template has already written the special tokens


def check_length(num_tokens: int, max_new_tokens: int, limit: int | None, where: str) -> None:
    """Refuse a prompt that leaves no room for its response.

    Args:
        num_tokens: tokens of the prompt.
        max_new_tokens: tokens that the response may have.
        limit: tokens that the model has positions for; None when it states no limit.
        where: what the message begins with.

    Raises:
        UserError: prompt and response together exceed the limit.
    """
    if limit is not None and num_tokens + max_new_tokens > limit:
        raise UserError(
            f"{where}: {num_tokens} prompt tokens + {max_new_tokens} new tokens exceed the model's limit of {limit}"
        )


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Count the tokens of each text, without special tokens."""
    return [len(ids) for ids in _encode(tokenizer, list(texts))]


@overload
def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]: ...
@overload
def _encode(tokenizer: PreTrainedTokenizerBase, text: list[str]) -> list[list[int]]: ...
def _encode(tokenizer: PreTrainedTokenizerBase, text: str | list[str]) -> list[int] | list[list[int]]:
    # verbose=False: check_length speaks of length, as an error and not as a warning.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
