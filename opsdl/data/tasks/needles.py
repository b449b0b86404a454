"""Needle questions in real text, after RULER: numbers hidden in a long context, and a question that asks for some.

    single       one needle, asked for
    multikey     four needles with different keys, one asked for: three compete, worded alike
    multivalue   one key with two or three numbers, all asked for
    multiquery   four needles with different keys, two asked for

The train and the eval split share no key, no number, no wording and no passage of the haystack.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opsdl.config import checked, one_of, positive
from opsdl.data.tasks.base import SPLITS
from opsdl.data.tasks.haystacks import HAYSTACKS, region
from opsdl.data.tasks.matching import found
from opsdl.data.tasks.passages import excerpt, hide
from opsdl.data.tasks.wordings import NOUNS, NUMBERS, WORDINGS
from opsdl.data.triplets import Triplet
from opsdl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("single", "multikey", "multivalue", "multiquery")
NUM_KEYS = 4  # of multikey and multiquery
COUNT_WORDS = {2: "two", 3: "three"}


@dataclass
class Needles:
    """The task, with its options. Raises UserError for kinds it does not know, and for questions that they exclude."""

    haystack: str = one_of("kjv", *HAYSTACKS)
    # Disjoint keys, values, wording and haystack region. Without one, training draws from train, evaluation from eval.
    split: str | None = checked(None, f"{', '.join(SPLITS)} or null", lambda split: split in (None, *SPLITS))
    kinds: list[str] = field(default_factory=lambda: list(KINDS))  # they take turns
    length: int = positive(1000)  # tokens of the long context
    questions: int = positive(1)  # asked about one long context, each for another key; they share its prefill
    short_length: int = positive(150)  # tokens of the short context, an excerpt that holds the evidence

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise UserError(f"needles: kinds is {list(self.kinds)}; expected some of {', '.join(KINDS)}")
        if self.questions > 1 and (set(self.kinds) != {"multikey"} or self.questions > NUM_KEYS):
            raise UserError(
                f"needles: questions is {self.questions} with kinds {list(self.kinds)}; expected 1, or up to {NUM_KEYS}"
                " with kinds [multikey]"
            )

    def item(self, tokenizer: PreTrainedTokenizerBase, split: str, seed: int, index: int) -> Triplet:
        """Make one item. Each run of `questions` items asks about one long context, each for another key.

        The long context is a passage of the haystack with the needles between its units, one a line, within a few
        tokens of `length` and never above. The short context is an excerpt of it of at most `short_length` tokens: the
        needles asked for with the lines around them, and no competing needle.

        Args:
            tokenizer: counts the tokens, which are those of the text alone, without special tokens.
            split: "train" or "eval", unless the options fix it.
            seed: another seed gives other items.
            index: the number of the item, from 0 on.

        Raises:
            UserError: the lengths cannot hold the needles, or exceed the haystack; or there is no such haystack or
                split.
        """
        split = self.split or split
        units = region(self.haystack, split)
        context, question = divmod(index, self.questions)
        kind = self.kinds[context % len(self.kinds)]
        name = f"{self.haystack}-{split}-{kind}-{self.length}-{context}"
        rng = random.Random(f"{seed}/{name}")
        drawn = _draw(kind, split, rng, question)
        lines, places = hide(tokenizer, drawn.sentences, units, self.length, rng)
        if len(lines) - len(places) == len(units):
            raise UserError(f"needles: length {self.length} exceeds the {split} region of {self.haystack}")
        evidence = [places[i] for i in drawn.asked]
        competing = [place for place in places if place not in evidence]
        short_context = excerpt(tokenizer, lines, evidence, competing, self.short_length)
        if self.questions > 1:
            name += f"-{question}"
        return Triplet("\n".join(lines), short_context, drawn.question, drawn.answers, name, kind)

    def score(self, text: str, triplet: Triplet) -> float:
        """Compute the share of the numbers asked for that the text contains."""
        return found(text, triplet.answers)

    def describe(self) -> str:
        """Name the questions, the text they hide in, and the lengths of both contexts."""
        return (
            f"needle questions ({', '.join(self.kinds)}) in {self.haystack} text, "
            f"{self.length} tokens of long and {self.short_length} of short context"
        )

    def apart(self) -> str:
        """Name what items of the two splits never share."""
        return "key, value, wording or haystack region"


@dataclass(frozen=True)
class Draw:
    """The needle sentences of one item, the question, its answers, and which of the sentences answer it."""

    sentences: list[str]
    question: str
    answers: tuple[str, ...]
    asked: range


def _draw(kind: str, split: str, rng: random.Random, first: int) -> Draw:
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
    return Draw(sentences, question, tuple(values[i] for i in asked), asked)
