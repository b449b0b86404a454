"""A context and a question as the prompt of a chat model."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from opsdl.errors import UserError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, context: str, question: str, template: str) -> list[int]:
    """Token ids of one user turn, ready for the assistant's answer; never truncated.

    `template` holds {context} and {question}, e.g. "{context}\\n\\n{question}". The texts go in verbatim: braces in
    them mean nothing. Raises UserError when the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path or '(unnamed)'}: has no chat template; expected an instruct model's"
        )
    # The question first fills a template without context: a context that happens to say "{question}" stays as it is.
    before, after = (part.replace("{question}", question) for part in template.split("{context}"))
    message = {"role": "user", "content": before + context + after}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return _encode(tokenizer, text)  # the chat template has already written the special tokens


def check_length(num_tokens: int, max_new_tokens: int, limit: int | None, where: str) -> None:
    """Raise UserError when prompt and response together exceed `limit` tokens (None: the model states no limit)."""
    if limit is not None and num_tokens + max_new_tokens > limit:
        raise UserError(
            f"{where}: {num_tokens} prompt tokens + {max_new_tokens} new tokens exceed the model's limit of {limit}"
        )


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """Tokens of each text, without special tokens."""
    return [len(ids) for ids in _encode(tokenizer, texts)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str | list[str]) -> list:
    # verbose=False: check_length speaks of length, as an error and not as a warning.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
