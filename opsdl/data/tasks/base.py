"""What a task is: a maker of questions about long contexts, of which it knows the short context and the answer.

To add a task, write a dataclass with these members in a file of this folder and put its name into TASKS
(opsdl/data/tasks/__init__.py). The fields of the dataclass are its options in the config, their bounds stand in the
fields' metadata (`opsdl.config.checked` and the like).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from opsdl.data.triplets import Triplet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "eval")


class Task(Protocol):
    """A maker of triplets whose answers can be scored."""

    @property
    def split(self) -> str | None:
        """The split that the config fixes, whatever the caller asks for; None where the caller's counts."""

    @property
    def length(self) -> int:
        """Tokens of the long context, without the question."""

    def item(self, tokenizer: PreTrainedTokenizerBase, split: str, seed: int, index: int) -> Triplet:
        """Make one item.

        It depends on the arguments and the options alone, so that a resumed run goes on with the items it would have
        seen, and that an evaluation asks the same before and after training. Consecutive items may be questions about
        one and the same long context: they then share its prefill.

        Args:
            tokenizer: counts the tokens of the contexts.
            split: "train" for what is trained on, "eval" for what is evaluated on; their items do not overlap.
            seed: another seed gives other items.
            index: the number of the item, from 0 on.

        Raises:
            UserError: the options allow no such item.
        """

    def score(self, text: str, triplet: Triplet) -> float:
        """Judge a response to one of the items: 0 is wrong, 1 is right, and what lies between is right in part."""

    def describe(self) -> str:
        """Name the questions in one phrase for reports, e.g. "needle questions (single) in kjv text"."""

    def apart(self) -> str:
        """Name what items of the two splits never share, e.g. "key, value or wording"."""
