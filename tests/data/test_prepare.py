"""Triplets from raw documents."""

from __future__ import annotations

import pytest

from opsdl.data.chat import count_tokens
from opsdl.data.prepare import prepare
from opsdl.data.tasks import haystacks
from tests.support.errors import refuses


@pytest.fixture
def books(tmp_path):
    """Two documents of 60 and 40 verses, three verses a paragraph."""
    verses = haystacks.sentences("kjv")
    for name, passage in (("one.txt", verses[:60]), ("two.md", verses[900:940])):
        paragraphs = ["\n".join(passage[i : i + 3]) for i in range(0, len(passage), 3)]
        (tmp_path / name).write_text("\n\n".join(paragraphs))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    return tmp_path


def test_documents_become_triplets(tokenizer, books):
    seen = []

    def questions(short_context):
        seen.append(short_context)
        return ["Who?", "Why?"]

    sizes = dict(tokenizer=tokenizer, long_tokens=900, short_tokens=250, questions=questions)
    triplets = list(prepare([books], per_document=3, seed=4, **sizes))
    assert [t.short_context for t in triplets[::2]] == seen and len(seen) == 6
    assert [t.question for t in triplets[:2]] == ["Who?", "Why?"]
    assert len({t.id for t in triplets}) == 12
    for triplet in triplets:
        long, short = count_tokens(tokenizer, [triplet.long_context, triplet.short_context])
        assert 600 < long <= 900 and 50 < short <= 250
        assert triplet.short_context in triplet.long_context
        assert any(triplet.long_context in path.read_text() for path in (books / "one.txt", books / "two.md"))
    again = list(prepare([books / "one.txt", books / "two.md"], per_document=2, seed=4, **sizes))
    assert again == triplets[:4] + triplets[6:10]


def test_a_document_without_a_question_yields_nothing(tokenizer, books):
    sizes = dict(tokenizer=tokenizer, long_tokens=900, short_tokens=250)
    assert list(prepare([books], questions=lambda short_context: [], **sizes)) == []


def test_bad_documents_are_refused_before_any_question(tokenizer, books):
    def start(*paths, short_tokens=250):
        prepare(paths, tokenizer=tokenizer, long_tokens=900, short_tokens=short_tokens, questions=pytest.fail)

    with refuses("document .*missing.txt: no such file"):
        start(books / "one.txt", books / "missing.txt")
    with refuses("ignored.bin: not UTF-8 text at byte 0"):
        start(books / "ignored.bin")
    with refuses("one.txt: every paragraph exceeds short_tokens 20"):
        start(books, short_tokens=20)
    with refuses("short_tokens 901, long_tokens 900; expected"):
        start(books, short_tokens=901)
    (books / "two.md").write_text(" \n\n")
    with refuses("two.md: empty"):
        start(books)
    (books / "bare").mkdir()
    with refuses("bare: no .txt or .md file"):
        start(books / "bare")
