"""The stream of prompts: its order, its epochs, and what is grouped."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from opsdl.config import Chosen, DataConfig
from opsdl.data.chat import encode_prompt
from opsdl.data.prompts import Prompt, Prompts, by_context, common_beginning, open_source
from opsdl.data.tasks import Needles
from opsdl.data.triplets import Triplet, write_triplets
from tests.support.errors import refuses

TEMPLATE = "{context}\n{question}"
NEEDLES = Needles(kinds=["multikey"], length=160, short_length=60)
FILE = [(f"file:{n}", Triplet(f"long {n}", f"short {n}", "Which?", (str(n),), id=str(n))) for n in range(7)]


@pytest.fixture
def make(tokenizer):
    def make(source, **changes):
        settings = dict(template=TEMPLATE, limit=2048, max_new_tokens=8, seed=5, prompts_per_step=3)
        return Prompts(source, tokenizer, device=torch.device("cpu"), **(settings | changes))

    return make


def ids(prompts) -> list[str]:
    return [prompt.triplet.id for prompt in prompts]


def test_a_file_is_read_in_a_new_order_each_epoch(make):
    prompts = make(FILE)
    epochs = [ids(prompts[epoch * 7 + place] for place in range(7)) for epoch in range(4)]
    assert all(sorted(epoch) == sorted(ids(prompts.file)) for epoch in epochs), "each triplet once an epoch"
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != [str(n) for n in range(7)]
    assert epochs != [ids(make(FILE, seed=6)[epoch * 7 + place] for place in range(7)) for epoch in range(4)]


def test_the_order_of_an_epoch_is_drawn_from_seed_and_epoch(make):
    prompts = make(FILE)
    for epoch in range(3):
        expected = [str(n) for n in range(7)]
        random.Random(f"5/{epoch}").shuffle(expected)
        assert ids(prompts[epoch * 7 + place] for place in range(7)) == expected


def test_the_order_is_that_of_earlier_versions(make):
    assert "".join(ids(prompt for step in range(7) for prompt in make(FILE).batch(step))) == "204136515234603205614"


def test_steps_take_consecutive_prompts(make):
    for source in (FILE, NEEDLES):
        prompts = make(source, prompts_per_step=2)
        taken = [prompt for step in range(3) for prompt in prompts.batch(step)]
        assert ids(taken) == ids(prompts[index] for index in range(6))
        assert ids(prompts.batch(2)) == ids(make(source, prompts_per_step=2).batch(2)), "whatever came before"


def test_a_task_gives_a_new_item_for_each_index(make, tokenizer):
    prompts = make(NEEDLES)
    triplets = [prompts[index].triplet for index in range(6)]
    assert triplets == [NEEDLES.item(tokenizer, "train", 5, index) for index in range(6)]
    assert max(Counter(triplet.long_context for triplet in triplets).values()) == 1
    assert triplets[0] != make(NEEDLES, seed=6)[0].triplet


@pytest.mark.parametrize("source", [FILE, NEEDLES], ids=["file", "task"])
def test_a_prompt_holds_both_contexts_as_token_ids(make, tokenizer, source):
    prompt = make(source)[4]
    triplet = prompt.triplet
    assert prompt.long_ids.dtype == torch.int64
    assert prompt.long_ids.tolist() == encode_prompt(tokenizer, triplet.long_context, triplet.question, TEMPLATE)
    assert prompt.short_ids.tolist() == encode_prompt(tokenizer, triplet.short_context, triplet.question, TEMPLATE)


def test_responses_are_scored_where_the_answers_are_known(make):
    from_task, from_file = make(NEEDLES)[0], make(FILE)[0]
    assert from_task.score(from_task.triplet.answers[0]) == 1 and from_task.score("no") == 0
    assert from_file.score(f"it is {from_file.triplet.id}") == 1 and from_file.score("x") == 0
    assert replace(from_file, triplet=Triplet("a", "b", "c")).score("a") is None


def test_prompts_that_do_not_fit_are_refused(make, tokenizer):
    triplet = Triplet("word " * 50, "word", "Which?")
    length = len(encode_prompt(tokenizer, triplet.long_context, "Which?", TEMPLATE))
    make([("file:1", triplet)], limit=length + 8)
    make([("file:1", triplet)], limit=None)
    with refuses(rf"file:9, long_context: {length} prompt tokens \+ 8 new tokens exceed the model's limit of"):
        make([*FILE, ("file:9", triplet)], limit=length + 7)
    with refuses("file:9, short_context: "):
        make([("file:9", Triplet("word", "word " * 50, "Which?"))], limit=length + 7)
    prompts = make(NEEDLES, limit=100)
    with refuses("item kjv-train-multikey-160-3, long_context"):
        prompts[3]


def test_prompts_over_one_context_are_grouped_while_they_follow_each_other(make):
    prompts = make(Needles(kinds=["multikey"], length=160, short_length=60, questions=2))
    a, b, c, d = (prompts[index] for index in range(4))
    assert [ids(group) for group in by_context([a, b, c, d])] == [ids([a, b]), ids([c, d])]
    assert [ids(group) for group in by_context([a, c, b])] == [ids([a]), ids([c]), ids([b])]
    assert [ids(group) for group in by_context([a, a, c])] == [ids([a, a]), ids([c])]
    assert by_context([]) == []


def test_the_common_beginning_ends_where_prompts_differ():
    def prompt(*long_ids):
        return Prompt(Triplet("a", "b", "c"), torch.tensor(long_ids), torch.tensor([1]))

    def beginning(*prompts):
        return common_beginning(list(prompts)).tolist()

    assert beginning(prompt(1, 2, 3, 4), prompt(1, 2, 5, 4)) == [1, 2]
    assert beginning(prompt(1, 2, 3), prompt(1, 2), prompt(1, 2, 3, 4)) == [1, 2]
    assert beginning(prompt(1, 2), prompt(3, 2)) == []
    assert beginning(prompt(1, 2, 3), prompt(1, 2, 3)) == [1, 2, 3]
    assert beginning(prompt(1, 2, 3)) == [1, 2, 3]


def test_the_source_is_the_file_or_else_the_task(tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    write_triplets(path, [triplet for _, triplet in FILE])
    task = Chosen("needles", {"length": 160})
    assert open_source(DataConfig(task=task), tokenizer) == Needles(length=160)
    placed = [(f"{path}:{n}", triplet) for n, (_, triplet) in enumerate(FILE, start=1)]
    assert open_source(DataConfig(triplets=str(path), task=task), tokenizer) == placed
    with refuses("unknown key data.needels; the nearest valid key is data.needles"):
        open_source(DataConfig(task=Chosen("needels")), tokenizer)


def test_the_extractor_of_the_config_finds_short_contexts(tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    text = "The fox is red.\nThe cat is grey.\n" + "Nothing else is of any colour.\n" * 9
    path.write_text(json.dumps({"long_context": text, "question": "What colour has the cat?"}))
    with refuses("t.jsonl:1: key 'short_context' is missing"):
        open_source(DataConfig(triplets=str(path)), tokenizer)
    ((_, triplet),) = open_source(DataConfig(triplets=str(path), extractor="bm25", extract_tokens=8), tokenizer)
    assert triplet.short_context == "The cat is grey."
    with refuses("key data.extractor is 'bm52'; expected one of bm25"):
        open_source(DataConfig(triplets=str(path), extractor="bm52"), tokenizer)
