"""A context and a question as token ids."""

from __future__ import annotations

from opsdl.data.chat import check_length, encode_prompt
from tests.support.errors import refuses


def test_a_prompt_is_one_user_turn_with_the_texts_verbatim(tokenizer):
    ids = encode_prompt(tokenizer, "braces {question} {0}", "Why {context}?", "<{context}|{question}>")
    text = tokenizer.decode(ids)
    assert text.endswith("user\n<braces {question} {0}|Why {context}?><|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>user") == 1
    message = [{"role": "user", "content": "<a|b>"}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, "a", "b", "<{context}|{question}>") == expected


def test_a_tokenizer_without_chat_template_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with refuses("has no chat template"):
        encode_prompt(tokenizer, "a", "b", "{context}{question}")


def test_length_is_checked_and_never_cut():
    check_length(90, 10, 100, "item 3")
    check_length(10**9, 10, None, "item 3")
    with refuses("item 3: 91 prompt tokens . 10 new tokens exceed the model's limit of 100"):
        check_length(91, 10, 100, "item 3")
