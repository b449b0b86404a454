"""Short contexts found in real text."""

from __future__ import annotations

import sys

import pytest

from opsdl.data.chat import count_tokens
from opsdl.data.extract import EXTRACTORS, Bm25
from opsdl.data.tasks import Needles
from opsdl.data.tasks.haystacks import sentences
from opsdl.data.tasks.passages import GAP
from tests.support.errors import refuses

VERSES = sentences("kjv")[:400]
ARARAT = next(verse for verse in VERSES if "Ararat" in verse)
QUESTION = "On which mountains of Ararat did the ark rest?"


@pytest.fixture(scope="module")
def bm25(tokenizer):
    return EXTRACTORS["bm25"](tokenizer)


def size(tokenizer, text):
    return count_tokens(tokenizer, [text])[0]


@pytest.mark.parametrize("max_tokens", [60, 200, 500])
def test_an_excerpt_holds_the_best_lines_in_reading_order(bm25, tokenizer, max_tokens):
    text = bm25.extract("\n".join(VERSES), QUESTION, max_tokens)
    assert ARARAT in text
    lines = [line for run in text.split(GAP) for line in run.split("\n")]
    places = [VERSES.index(line) for line in lines]
    assert places == sorted(set(places))
    assert all(run in "\n".join(VERSES) for run in text.split(GAP))
    assert size(tokenizer, text) <= max_tokens
    if max_tokens > 60:
        assert "ark" in text and size(tokenizer, text) > 0.8 * max_tokens


def test_the_best_line_alone_where_no_other_fits(bm25, tokenizer):
    exactly = size(tokenizer, ARARAT)
    assert bm25.extract("\n".join(VERSES), QUESTION, exactly) == ARARAT
    assert ARARAT not in (bm25.extract("\n".join(VERSES), QUESTION, exactly - 1) or "")


def test_paragraphs_stay_whole_and_long_ones_are_searched_by_line(bm25, tokenizer):
    paragraphs = ["\n".join(VERSES[i : i + 4]) for i in range(0, len(VERSES), 4)]
    whole = next(paragraph for paragraph in paragraphs if ARARAT in paragraph)
    limit = size(tokenizer, whole)
    assert bm25.extract("\n\n".join(paragraphs), QUESTION, limit) == whole
    assert ARARAT in bm25.extract("\n\n".join(paragraphs), QUESTION, limit - 1).split("\n")


def test_neighbours_keep_what_lies_between_them(bm25):
    text = "red fox\n \n\nred cat\n\nred cow\n\nno match here"
    assert bm25.extract(text, "red?", 50) == "red fox\n \n\nred cat\n\nred cow"
    assert bm25.extract("red fox\n\nno match here\n\nred cow", "red?", 50) == f"red fox{GAP}red cow"


def test_needles_are_found_by_their_keys(bm25, tokenizer):
    task = Needles(kinds=["single", "multikey"], length=600)
    for index in range(6):
        triplet = task.item(tokenizer, "eval", 0, index)
        assert triplet.answers[0] in bm25.extract(triplet.long_context, triplet.question, 100)


@pytest.mark.parametrize("question", ["Zeppelin?", "", "??"])
def test_nothing_is_found_where_nothing_matches(bm25, question):
    assert bm25.extract("\n".join(VERSES), question, 200) is None
    assert bm25.extract(" \n\n", question, 200) is None


def test_nothing_is_found_where_no_match_fits(bm25):
    assert bm25.extract(ARARAT, QUESTION, 5) is None


def test_a_missing_package_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with refuses("extractor bm25: the package bm25s is not installed; expected: pip install bm25s"):
        Bm25(tokenizer)
