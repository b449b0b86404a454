"""One real evaluation, against greedy decoding by transformers."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from opsdl.config import Chosen, EvaluationConfig, EvaluationSet
from opsdl.data.chat import encode_prompt
from opsdl.data.tasks import Needles, found
from opsdl.evaluation import evaluate
from opsdl.evaluation.evaluate import SEED_OFFSET
from opsdl.models import eos_token_ids
from tests.support.errors import refuses

MODULE = import_module("opsdl.evaluation.evaluate")  # the package gives its function that name
TEMPLATE = "{context}\n\n{question}"
OPTIONS = {"haystack": "python", "kinds": ["single", "multivalue"], "length": 200, "short_length": 100}
SETTINGS = EvaluationConfig(
    [EvaluationSet("python-200", 2, Chosen("needles", OPTIONS)), EvaluationSet("defaults", 1)],
    max_new_tokens=6,
    batch_size=3,
)


@pytest.fixture
def run(tiny_model, tokenizer):
    def run(settings=SETTINGS, compute_dtype="float32"):
        return evaluate(
            tiny_model, tokenizer, settings, template=TEMPLATE, compute_dtype=compute_dtype, seed=3, progress=False
        )

    return run


def test_answers_are_those_of_greedy_decoding_by_transformers(run, tiny_model, tokenizer):
    tiny_model.train()
    result = run()
    assert tiny_model.training, "the mode the model came in"
    assert result.seconds > 0

    chosen, _ = result.sets
    assert (chosen.name, chosen.length) == ("python-200", 200)
    assert chosen.task == Needles(**OPTIONS).describe()
    triplets = [Needles(**OPTIONS).item(tokenizer, "eval", 3 + SEED_OFFSET, index) for index in range(2)]
    assert [(s.id, s.task, s.question, s.answers) for s in chosen.samples] == [
        (t.id, t.task, t.question, t.answers) for t in triplets
    ]
    tiny_model.eval()
    for triplet, sample in zip(triplets, chosen.samples, strict=True):
        for name, context in (("long", triplet.long_context), ("short", triplet.short_context)):
            text = greedy(tiny_model, tokenizer, encode_prompt(tokenizer, context, triplet.question, TEMPLATE))
            assert getattr(sample, f"{name}_text") == text
            assert getattr(sample, f"{name}_score") == found(text, triplet.answers)


def greedy(model, tokenizer, ids) -> str:
    ids_1P = torch.tensor([ids])
    out = model.generate(
        ids_1P,
        attention_mask=torch.ones_like(ids_1P),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=eos_token_ids(model, tokenizer),
        pad_token_id=0,
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def test_every_set_is_answered_with_its_own_items(run):
    result = run()
    assert [(chosen.name, len(chosen.samples), chosen.length) for chosen in result.sets] == [
        ("python-200", 2, 200),
        ("defaults", 1, 1000),
    ]
    assert result.sets[1].samples[0].id.startswith("kjv-eval-single-1000-0")


def test_the_batch_size_changes_nothing(run):
    alone = run(EvaluationConfig(SETTINGS.sets, max_new_tokens=6, batch_size=1))
    assert alone.sets == run().sets


def test_answers_are_decoded_in_the_compute_dtype(run, monkeypatch):
    seen = []

    def answer(model, tokenizer, settings, prompts, bar):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()))
        assert not model.training
        return [""] * len(prompts)

    monkeypatch.setattr(MODULE, "_answer", answer)
    run(compute_dtype="float32")
    run(compute_dtype="bfloat16")
    assert [enabled for enabled, _, _ in seen] == [False, False, True, True]
    assert seen[-1] == (True, torch.bfloat16, False)


def test_prompts_that_do_not_fit_are_refused_before_any_answer(run, tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.config, "max_position_embeddings", 600)
    monkeypatch.setattr(MODULE, "_answer", pytest.fail)
    with refuses("evaluation set defaults, item kjv-eval-single-1000-0, long_context"):
        run()


def test_bad_options_are_refused_with_the_number_of_their_set(run):
    bad = EvaluationSet("bad", 1, Chosen("needles", {"length": -1}))
    with refuses(r"key evaluation\.sets\[1\]\.needles\.length is -1; expected a positive number"):
        run(EvaluationConfig([SETTINGS.sets[0], bad]))
