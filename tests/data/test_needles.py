"""Needle questions: what every item promises, and that items stay what they are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import pytest

from opsdl.config import Chosen, build
from opsdl.data.chat import count_tokens
from opsdl.data.tasks import SPLITS, TASKS, Needles
from opsdl.data.tasks.haystacks import HAYSTACKS, region, sentences
from opsdl.data.tasks.needles import KINDS
from opsdl.data.tasks.passages import GAP, runs
from opsdl.data.tasks.wordings import NOUNS, NUMBERS, WORDINGS
from opsdl.data.triplets import Triplet
from tests.support.errors import refuses


def items(task, tokenizer, count, *, seed, split="train") -> list[Triplet]:
    return [task.item(tokenizer, split, seed, index) for index in range(count)]


def test_splits_share_no_key_no_number_and_no_wording():
    for table in (NOUNS, NUMBERS):
        assert set(table["train"]).isdisjoint(table["eval"])
        assert len(set(table["train"])) == len(table["train"]) and len(set(table["eval"])) == len(table["eval"])
    assert min(map(len, NOUNS.values())) >= 60
    texts = {
        split: {text for w in wordings for text in (w.needle, w.one, w.values, w.keys)}
        for split, wordings in WORDINGS.items()
    }
    assert texts["train"].isdisjoint(texts["eval"])
    spoken = " ".join(sentences("kjv")).lower().split()
    assert set(spoken).isdisjoint(NOUNS["train"] + NOUNS["eval"])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_needles_keep_what_they_promise(tokenizer, haystack, split):
    task = Needles(haystack=haystack, length=700, short_length=150)
    units = set(region(haystack, split))
    for index, triplet in enumerate(items(task, tokenizer, 24, seed=5, split=split)):
        assert triplet.task == KINDS[index % 4]
        assert triplet.id == f"{haystack}-{split}-{triplet.task}-700-{index}"
        long, short = count_tokens(tokenizer, [triplet.long_context, triplet.short_context])
        assert 0.98 * 700 <= long <= 700 and short <= 150

        lines = triplet.long_context.split("\n")
        hidden = [line for line in lines if numbers(line) and any(noun in line for noun in NOUNS[split])]
        asked = [line for line in hidden if any(answer in line for answer in triplet.answers)]
        competing = [line for line in hidden if line not in asked]
        assert len(asked) == len(triplet.answers)
        assert (len(asked), len(competing)) in {
            "single": {(1, 0)}, "multikey": {(1, 3)}, "multivalue": {(2, 0), (3, 0)}, "multiquery": {(2, 2)}
        }[triplet.task]  # fmt: skip
        assert len([line for line in lines if line not in units and line not in hidden]) <= 1  # the one cut to length

        assert all(answer in triplet.short_context for answer in triplet.answers)
        assert not any(line in triplet.short_context for line in competing)
        for run in triplet.short_context.split(GAP):
            assert run in triplet.long_context


def numbers(line: str) -> list[str]:
    words = (word.strip(".,") for word in line.split())
    return [word for word in words if len(word) == 5 and word.isdigit()]


@pytest.mark.parametrize(
    ("options", "split", "count", "seed", "digest"),
    [
        ({}, "train", 8, 0, "dfefc85bf763c3dba60d97dc79b75899af1064918794ab47648699911f7f4431"),
        (
            {"length": 500, "short_length": 100},
            "eval", 8, 7, "61f7b9bdf6c22252cf535c78967e4f0c0ad8567c634f0fffab4787a49c5aba05",
        ),
        (
            {"kinds": ["multikey"], "length": 300, "short_length": 80, "questions": 4},
            "train", 9, 1, "0525a02aaa01ee3e2f74383a05a47c51b58658de27378735a5b7e4bd6b88ad48",
        ),
    ],
    ids=["the defaults", "another split and other lengths", "questions about one context"],
)  # fmt: skip
def test_items_are_those_of_earlier_versions(tokenizer, options, split, count, seed, digest):
    """The digests are those of version 0.1: results with the same config and seed can be compared across versions."""
    rows = [asdict(triplet) for triplet in items(Needles(**options), tokenizer, count, seed=seed, split=split)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == digest


def test_an_item_depends_on_seed_and_index_alone(tokenizer):
    task = Needles(length=300)
    first = items(task, tokenizer, 6, seed=1)
    assert first[5] == task.item(tokenizer, "train", 1, 5)
    assert len({item.long_context for item in first + items(task, tokenizer, 6, seed=2)}) == 12
    assert len({item.id for item in first}) == 6


def test_the_split_of_the_options_goes_before_that_of_the_caller(tokenizer):
    free = Needles(kinds=["single"], length=200)
    fixed = replace(free, split="train")
    assert fixed.item(tokenizer, "eval", 0, 3) == free.item(tokenizer, "train", 0, 3)
    assert free.item(tokenizer, "eval", 0, 3) != free.item(tokenizer, "train", 0, 3)


def test_the_numbers_asked_for_are_what_scores(tokenizer):
    task = Needles(kinds=["multivalue"], length=300)
    right, other = items(task, tokenizer, 2, seed=0)
    assert set(right.answers).isdisjoint(other.answers)
    assert task.score(" and ".join(right.answers), right) == 1
    assert task.score(f"It is {right.answers[0]}.", right) == pytest.approx(1 / len(right.answers))
    assert task.score(" and ".join(other.answers), right) == 0
    assert task.score("", right) == 0


def test_a_needle_task_describes_itself():
    task = Needles("python", kinds=["single", "multikey"], length=700, short_length=90)
    expected = "needle questions (single, multikey) in python text, 700 tokens of long and 90 of short context"
    assert task.describe() == expected
    assert task.apart() == "key, value, wording or haystack region"


def test_impossible_needles_are_refused(tokenizer):
    def make(split="train", **options):
        return Needles(**({"kinds": ["multikey"]} | options)).item(tokenizer, split, 0, 0)

    with refuses(r"kinds is \['single', 'uuid'\]; expected some of single, multikey, multivalue, multiquery"):
        make(kinds=["single", "uuid"])
    with refuses(r"kinds is \[\]"):
        make(kinds=[])
    with refuses("unknown split 'dev'"):
        make(split="dev")
    with refuses("length 40 cannot hold 4 needles"):
        make(length=40)
    with refuses("short_length 5 cannot hold the 1 needles asked for; expected at least"):
        make(short_length=5)
    with refuses("length 9000000 exceeds the eval region of python"):
        make(haystack="python", split="eval", length=9_000_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"haystack": "essays"}, "key data.needles.haystack is 'essays'; expected one of kjv, python"),
        ({"split": "dev"}, "key data.needles.split is 'dev'; expected train, eval or null"),
        ({"kinds": ["uuid"]}, r"needles: kinds is \['uuid'\]; expected some of single, "),
        ({"length": 0}, "key data.needles.length is 0; expected a positive number"),
        ({"short_length": -1}, "key data.needles.short_length is -1; expected a positive number"),
        ({"questions": 0}, "key data.needles.questions is 0; expected a positive number"),
        ({"lenght": 3}, "unknown key data.needles.lenght; the nearest valid key is data.needles.length"),
    ],
)
def test_bad_options_are_refused_with_their_key(options, message):
    with refuses(message):
        build(TASKS, Chosen("needles", options), "data")


def test_questions_about_one_context(tokenizer):
    triplets = items(Needles(kinds=["multikey"], length=300, short_length=80, questions=4), tokenizer, 8, seed=1)
    assert len({t.id for t in triplets}) == 8
    for group in (triplets[:4], triplets[4:]):
        assert len({t.long_context for t in group}) == 1
        assert len({t.question for t in group}) == len({t.answers for t in group}) == 4
        for t in group:
            assert t.answers[0] in t.short_context and t.answers[0] in t.long_context
            others = [o.answers[0] for o in group if o is not t]
            assert not any(other in t.short_context for other in others)
    assert triplets[0].long_context != triplets[4].long_context


@pytest.mark.parametrize("options", [{"questions": 2}, {"kinds": ["multikey"], "questions": 5}])
def test_questions_about_one_context_need_a_key_each(options):
    with refuses("questions is . with kinds"):
        Needles(**options)


def test_runs_are_the_stretches_of_consecutive_numbers():
    assert runs([]) == []
    assert runs([7, 2, 3, 5, 4, 9, 10]) == [range(2, 6), range(7, 8), range(9, 11)]
