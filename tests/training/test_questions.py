"""The model as the writer of questions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from opsdl.training.questions import ASK, self_questions
from tests.support.errors import refuses


@pytest.mark.parametrize(
    "reply, expected", [("Sure:\n Who went? \nWhy?", ["Who went?"]), ("I cannot ask.", []), ("", [])]
)
def test_the_first_line_that_asks_is_the_question(tokenizer, monkeypatch, reply, expected):
    def generate(model, prefixes, **options):
        assert options["generator"].initial_seed() == 7
        assert "a short text\n\n" + ASK in tokenizer.decode(prefixes[0])
        tokens = torch.tensor([tokenizer(reply).input_ids + [tokenizer.eos_token_id, 5]])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[0, -1] = False
        return [SimpleNamespace(tokens=tokens, mask=mask)]

    monkeypatch.setattr("opsdl.training.questions.prefill", lambda model, ids: ids)
    monkeypatch.setattr("opsdl.training.questions.generate", generate)
    model = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(max_position_embeddings=200))
    questions = self_questions(model, tokenizer, seed=7)
    assert questions("a short text") == expected
    with refuses("a short context: .* exceed the model's limit of 200"):
        questions("word " * 200)
