"""The seam of tasks: one that is added by an entry in the table goes the whole way from config to scores."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from opsdl.config import build, load_config, positive
from opsdl.data.prompts import Prompts, open_source
from opsdl.data.tasks import TASKS
from opsdl.data.triplets import Triplet
from opsdl.evaluation import evaluate
from tests.support.errors import refuses

CONFIG = """
run_dir: nowhere
model: {name: tiny, compute_dtype: float32}
data: {sums: {terms: 4}}
prompts_per_step: 2
evaluation:
  max_new_tokens: 2
  sets: [{name: two, items: 3, sums: {terms: 2}}]
"""


@dataclass
class Sums:
    """Sums to work out, scored by how near the answer is."""

    terms: int = positive(3)
    split: str | None = None

    @property
    def length(self) -> int:
        return 2 * self.terms

    def item(self, tokenizer, split, seed, index):
        numbers = [str(index + place + (100 if split == "eval" else 0)) for place in range(self.terms)]
        answer = str(sum(map(int, numbers)))
        return Triplet("\n".join(numbers), " + ".join(numbers), "The sum?", (answer,), f"{split}-{seed}-{index}", "sum")

    def score(self, text, triplet):
        return 1.0 if text == triplet.answers[0] else 0.25

    def describe(self):
        return f"sums of {self.terms}"

    def apart(self):
        return "number"


@pytest.fixture
def config(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "sums", Sums)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return lambda *overrides: load_config(path, overrides)


def test_a_new_task_is_trained_on(config, tokenizer):
    settings = config()
    prompts = Prompts(
        open_source(settings.data, tokenizer),
        tokenizer,
        template=settings.data.template,
        limit=None,
        max_new_tokens=4,
        device=torch.device("cpu"),
        seed=settings.seed,
        prompts_per_step=settings.prompts_per_step,
    )
    first, second = prompts.batch(1)
    assert (first.triplet.id, second.triplet.id) == ("train-0-2", "train-0-3")
    assert first.triplet.long_context == "2\n3\n4\n5"
    assert first.score("14") == 1 and first.score("15") == 0.25


def test_a_new_task_is_evaluated(config, tiny_model, tokenizer):
    settings = config()
    result = evaluate(
        tiny_model, tokenizer, settings.evaluation,
        template=settings.data.template, compute_dtype="float32", seed=7, progress=False,
    )  # fmt: skip
    (chosen,) = result.sets
    assert (chosen.name, chosen.task, chosen.length) == ("two", "sums of 2", 4)
    assert [sample.id for sample in chosen.samples] == [f"eval-{1_000_003 + 7}-{index}" for index in range(3)]
    assert [sample.answers for sample in chosen.samples] == [("201",), ("203",), ("205",)]
    assert {sample.long_score for sample in chosen.samples} == {0.25}


def test_options_of_a_new_task_are_checked(config):
    assert build(TASKS, config("data.sums.terms=5").data.task, "data") == Sums(5)
    with refuses("key data.sums.terms is 0; expected a positive number"):
        build(TASKS, config("data.sums.terms=0").data.task, "data")
    with refuses(r"unknown key data\.sums\.term; the nearest valid key is data\.sums\.terms"):
        build(TASKS, config("data.sums.term=2").data.task, "data")


def test_a_task_that_is_in_no_table_is_refused(config):
    with refuses(r"unknown key evaluation\.sets\[0\]\.sumz; the nearest valid key is evaluation\.sets\[0\]\.sums"):
        chosen = config("evaluation.sets=[{name: a, sumz: {}}]").evaluation.sets[0]
        build(TASKS, chosen.task, "evaluation.sets[0]")
