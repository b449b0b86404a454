"""The file of triplets."""

from __future__ import annotations

import json

import pytest

from opsdl.data.triplets import Triplet, read_triplets, write_triplets
from tests.support.errors import refuses

TRIPLET = Triplet("a long\ntext \u2028 é", "a text", "Which?", ("é", "7"), "one", "single")
ROW = {"long_context": "a b", "short_context": "a", "question": "b?"}


def test_triplets_survive_the_file(tmp_path):
    path = tmp_path / "t.jsonl"
    triplets = [TRIPLET, Triplet(**ROW)]
    write_triplets(path, triplets)
    assert read_triplets(path) == [(f"{path}:{number}", t) for number, t in enumerate(triplets, start=1)]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"long_context": "a"', "broken JSON: .* at column 21"),
        ("[1]", "expected a JSON object, found list"),
        (json.dumps(ROW | {"answer": "x"}), "unknown key 'answer'; the keys are long_context, "),
        (json.dumps({"long_context": "a", "short_context": "b"}), "key 'question' is missing"),
        (
            json.dumps({"long_context": "a", "question": "b"}),
            "key 'short_context' is missing; expected it, or a data",
        ),
        (json.dumps(ROW | {"short_context": None}), "key 'short_context' is None; expected text"),
        (json.dumps(ROW | {"long_context": " \n"}), "key 'long_context' is ' .n'; expected text"),
        (json.dumps(ROW | {"question": 3}), "key 'question' is 3; expected text"),
        (json.dumps(ROW | {"id": 3}), "key 'id' is 3; expected text"),
        (json.dumps(ROW | {"answers": "x"}), "key 'answers' is 'x'; expected a list"),
        (json.dumps(ROW | {"answers": [""]}), "key 'answers' is .*; expected a list"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + line + "\n")
    with refuses(rf"t\.jsonl:3: {message}") as caught:
        read_triplets(path)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    with refuses(r"t\.jsonl: no such file"):
        read_triplets(path)
    path.write_text("\n \n")
    with refuses(r"t\.jsonl: empty; expected"):
        read_triplets(path)
    path.write_bytes(b"{}\n\xff")
    with refuses(r"t\.jsonl: not UTF-8 text at byte 3"):
        read_triplets(path)
    with refuses("cannot write in .*nowhere"):
        write_triplets(tmp_path / "nowhere" / "t.jsonl", [TRIPLET])


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.jsonl"
    write_triplets(path, [TRIPLET])

    def interrupted():
        yield Triplet(**ROW)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_triplets(path, interrupted())
    assert [triplet for _, triplet in read_triplets(path)] == [TRIPLET]
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_short_context_is_asked_for_and_no_other(tmp_path):
    path = tmp_path / "t.jsonl"
    bare = {"long_context": "a b c", "question": "b?", "answers": ["b"]}
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(bare) + "\n")
    asked = []

    def shorten(long_context, question):
        asked.append((long_context, question))
        return "b c"

    triplets = [triplet for _, triplet in read_triplets(path, shorten)]
    assert triplets == [Triplet(**ROW), Triplet("a b c", "b c", "b?", ("b",))]
    assert asked == [("a b c", "b?")]
    with refuses(r"t\.jsonl:2: key 'short_context' is missing, and data.extractor finds nothing"):
        read_triplets(path, lambda long_context, question: None)


def test_a_bad_line_is_refused_before_anything_is_extracted(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"long_context": 3, "question": "b?"}))
    with refuses(r"t\.jsonl:1: key 'long_context' is 3"):
        read_triplets(path, pytest.fail)
