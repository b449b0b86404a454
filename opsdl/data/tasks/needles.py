"""Needle questions in real text, after RULER: numbers hidden in a long context, and a question that asks for some.

    single       one needle, asked for
    multikey     four needles with different keys, one asked for: three compete, worded alike
    multivalue   one key with two or three numbers, all asked for
    multiquery   four needles with different keys, two asked for

The train and the eval split share no key, no number, no wording and no passage of the haystack. Item i of a seed is the
same whatever the count, so a resumed run goes on with the items it would have seen.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from opsdl.data.chat import count_tokens
from opsdl.data.tasks.haystacks import region
from opsdl.data.triplets import Triplet
from opsdl.errors import UserError

if TYPE_CHECKING:  # the arrow runs from training to data
    from opsdl.config import NeedleConfig

KINDS = ("single", "multikey", "multivalue", "multiquery")
NUM_KEYS = 4  # of multikey and multiquery
COUNT_WORDS = {2: "two", 3: "three"}
GAP = "..."  # the line between two excerpts of a short context
UNIT_BATCH = 64  # units tokenized together; any number gives the same contexts


@dataclass(frozen=True)
class Wording:
    """A needle sentence, and the questions that ask for one number, all numbers of a key, or those of several keys."""

    needle: str
    one: str
    values: str
    keys: str


WORDINGS = {
    "train": (
        Wording(
            "The magic number for the {key} is {value}.",
            "What is the magic number for the {key}? Answer with the number only.",
            "What are the {count} magic numbers for the {key}? Answer with the numbers, separated by commas.",
            "What are the magic numbers for {keys}? Answer with the numbers, separated by commas.",
        ),
        Wording(
            "The code of the {key} is {value}.",
            "According to the text, what is the code of the {key}? Give just the number.",
            "According to the text, what are the {count} codes of the {key}? Give just the numbers in one line.",
            "According to the text, what are the codes of {keys}? Give just the numbers in one line.",
        ),
        Wording(
            "Remember that the {key} has ticket number {value}.",
            "Which ticket number does the {key} have? Reply briefly.",
            "Which {count} ticket numbers does the {key} have? Reply briefly with all of them.",
            "Which ticket numbers do {keys} have? Reply briefly with both of them.",
        ),
    ),
    "eval": (
        Wording(
            "The secret password of the {key} is {value}.",
            "What is the secret password of the {key} mentioned in the text? Answer briefly.",
            "What are all {count} secret passwords of the {key} mentioned in the text? Answer in one short sentence.",
            "What are the secret passwords of {keys} mentioned in the text? Answer in one short sentence.",
        ),
        Wording(
            "Serial number {value} was assigned to the {key}.",
            "What serial number was assigned to the {key}? Write the number alone.",
            "What {count} serial numbers were assigned to the {key}? Write them on a single line.",
            "What serial numbers were assigned to {keys}? Write them on a single line.",
        ),
        Wording(
            "Please note: the price listed for the {key} is {value} dollars.",
            "How many dollars is the price listed for the {key}? Keep the answer short.",
            "What are the {count} prices in dollars listed for the {key}? Keep the answer short.",
            "What are the prices in dollars listed for {keys}? Keep the answer short.",
        ),
    ),
}

# Modern things: no verse of the KJV speaks of them.
NOUNS = {
    "train": """accordion airplane backpack balloon banjo battery bicycle blender bookshelf bulldozer cabinet calculator
        camera canoe carousel cello computer cupboard drone elevator envelope escalator freezer guitar hammock harmonica
        helicopter jacket jigsaw keyboard kiosk lantern laptop lawnmower limousine locker marimba microphone mirror
        motorcycle notebook parachute piano printer projector puzzle racket refrigerator rocket saxophone scooter
        skateboard sofa stapler submarine suitcase teapot telescope thermometer toaster tractor trampoline trombone
        umbrella unicycle wheelbarrow""".split(),
    "eval": """ambulance aquarium armchair barometer briefcase bus calendar caravan chandelier chessboard clarinet
        dishwasher doorbell drill dumbbell fireplace flashlight forklift generator glider globe hairdryer handbag kayak
        lighthouse magnet mailbox mandolin mattress megaphone metronome microscope microwave minibus monitor oboe
        padlock paintbrush pendulum photocopier radiator radio robot sailboat satellite screwdriver sculpture sled
        snowboard stopwatch surfboard syringe tambourine telephone television toothbrush treadmill tricycle tuba
        typewriter ukulele vacuum violin windmill wristwatch xylophone yacht""".split(),
}  # fmt: skip

# Numbers of five digits, split by a residue that does not show.
NUMBERS = {
    "train": [number for number in range(10_000, 100_000) if number % 7 < 5],
    "eval": [number for number in range(10_000, 100_000) if number % 7 >= 5],
}


@dataclass(frozen=True)
class Needles:
    """The needle sentences of one item, the question, its answers, and which of the sentences answer it."""

    sentences: list[str]
    question: str
    answers: tuple[str, ...]
    asked: range


def make_needles(tokenizer: PreTrainedTokenizerBase, config: NeedleConfig, count: int, seed: int) -> list[Triplet]:
    """The first `count` items of a seed; see `make_needle`."""
    return [make_needle(tokenizer, config, seed, index) for index in range(count)]


def make_needle(tokenizer: PreTrainedTokenizerBase, config: NeedleConfig, seed: int, index: int) -> Triplet:
    """Item `index` of a seed; the kinds of `config` take turns. Each run of `config.questions` items asks about one
    long context, each for another key.

    The long context is a passage of the haystack with the needles between its units, one a line, within a few tokens of
    `config.length` and never above. The short context is an excerpt of it of at most `config.short_length` tokens: the
    needles asked for with the lines around them, and no competing needle. Tokens are those of the text alone, without
    special tokens.

    Raises UserError for an unknown haystack, split or kind, and for lengths that cannot hold the needles or that exceed
    the haystack.
    """
    units = region(config.haystack, config.split)
    if not config.kinds or not set(config.kinds) <= set(KINDS):
        raise UserError(f"needles: kinds is {list(config.kinds)}; expected some of {', '.join(KINDS)}")
    if config.questions > 1 and (set(config.kinds) != {"multikey"} or config.questions > NUM_KEYS):
        raise UserError(
            f"needles: questions is {config.questions} with kinds {list(config.kinds)}; expected 1, or up to {NUM_KEYS}"
            " with kinds [multikey]"
        )
    context, question = divmod(index, config.questions)
    kind = config.kinds[context % len(config.kinds)]
    name = f"{config.haystack}-{config.split}-{kind}-{config.length}-{context}"
    rng = random.Random(f"{seed}/{name}")
    needles = _draw(kind, config.split, rng, question)
    lines, places = _hide(tokenizer, needles.sentences, units, config.length, rng)
    if len(lines) - len(places) == len(units):
        raise UserError(f"needles: length {config.length} exceeds the {config.split} region of {config.haystack}")
    evidence = [places[i] for i in needles.asked]
    competing = [place for place in places if place not in evidence]
    short_context = _excerpt(tokenizer, lines, evidence, competing, config.short_length)
    if config.questions > 1:
        name += f"-{question}"
    return Triplet("\n".join(lines), short_context, needles.question, needles.answers, name, kind)


def _draw(kind: str, split: str, rng: random.Random, first: int) -> Needles:
    """`first` is the number of the first key asked for; what is hidden does not depend on it."""
    wording = rng.choice(WORDINGS[split])
    num_values = rng.randint(2, 3) if kind == "multivalue" else 1
    num_keys = NUM_KEYS if kind in ("multikey", "multiquery") else 1
    count = {"single": 1, "multikey": 1, "multivalue": num_values, "multiquery": 2}[kind]
    asked = range(first, first + count)
    keys = rng.sample(NOUNS[split], num_keys) * num_values
    values = [str(number) for number in rng.sample(NUMBERS[split], len(keys))]
    sentences = [wording.needle.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    if count == 1:
        question = wording.one.format(key=keys[first])
    elif kind == "multivalue":
        question = wording.values.format(key=keys[first], count=COUNT_WORDS[count])
    else:
        named = " and ".join(f"the {keys[i]}" for i in asked)
        question = wording.keys.format(keys=named)
    return Needles(sentences, question, tuple(values[i] for i in asked), asked)


def _hide(
    tokenizer: PreTrainedTokenizerBase, needles: list[str], units: tuple[str, ...], length: int, rng: random.Random
) -> tuple[list[str], list[int]]:
    """Lines of a long context of at most `length` tokens, and the line number of each needle."""
    start = rng.randrange(len(units))
    depths = [rng.random() for _ in needles]
    room = length - sum(_line_counts(tokenizer, needles))
    while room > 0:
        lines = _passage(tokenizer, units, start, room)
        slots = [round(depth * len(lines)) for depth in depths]
        order = sorted(range(len(needles)), key=slots.__getitem__)
        for shift, needle in enumerate(order):
            slots[needle] += shift
            lines.insert(slots[needle], needles[needle])
        excess = _count(tokenizer, "\n".join(lines)) - length
        if excess <= 0:
            return lines, slots
        room -= excess  # this tokenizer is not additive over lines
    raise UserError(f"needles: length {length} cannot hold {len(needles)} needles ({length - room} tokens) and text")


def _passage(tokenizer: PreTrainedTokenizerBase, units: tuple[str, ...], start: int, room: int) -> list[str]:
    """Consecutive units from `start` on, past the end from the beginning, the last one cut so that `room` is filled.

    All units, uncut, where they do not fill it.
    """
    passage: list[str] = []
    while len(passage) < len(units):
        indices = range(start + len(passage), start + min(len(passage) + UNIT_BATCH, len(units)))
        batch = [units[index % len(units)] for index in indices]
        for unit, count in zip(batch, _line_counts(tokenizer, batch), strict=True):
            if count > room:
                cut = _cut(tokenizer, unit, room)
                return [*passage, cut] if cut else passage
            passage.append(unit)
            room -= count
    return passage


def _cut(tokenizer: PreTrainedTokenizerBase, unit: str, room: int) -> str:
    """The first words of a unit, as many as fit."""
    words = unit.split(" ")
    beginnings = [" ".join(words[:size]) for size in range(1, len(words) + 1)]
    return " ".join(words[: bisect_right(_line_counts(tokenizer, beginnings), room)])


def _excerpt(
    tokenizer: PreTrainedTokenizerBase, lines: list[str], evidence: list[int], competing: list[int], length: int
) -> str:
    """The lines of `evidence` and as many lines around them as fit: contiguous runs, a GAP line between two of them.

    Every run grows by turns in both directions until it would exceed `length` tokens or meets a competing needle.
    """
    chosen = set(evidence)
    text = _join_runs(lines, chosen)
    if _count(tokenizer, text) > length:
        raise UserError(f"needles: short_length {length} cannot hold the {len(evidence)} needles asked for; "
                        f"expected at least {_count(tokenizer, text)}")  # fmt: skip
    edges = [(index, step) for step in (-1, 1) for index in evidence]
    while edges:
        grown = []
        for index, step in edges:
            index += step
            if index in competing or not 0 <= index < len(lines):
                continue
            candidate = _join_runs(lines, chosen | {index})
            if _count(tokenizer, candidate) <= length:
                chosen.add(index)
                text = candidate
                grown.append((index, step))
        edges = grown
    return text


def _join_runs(lines: list[str], chosen: set[int]) -> str:
    parts: list[str] = []
    for index in sorted(chosen):
        if parts and index - 1 not in chosen:
            parts.append(GAP)
        parts.append(lines[index])
    return "\n".join(parts)


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return count_tokens(tokenizer, [text])[0]


def _line_counts(tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> list[int]:
    """Tokens of each line with its line break."""
    return count_tokens(tokenizer, [line + "\n" for line in lines])
