"""How the loop is spread over processes: which prompts are a process's own, and sums over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from transformers import PreTrainedModel

T = TypeVar("T")


class Parallel(Protocol):
    """A mesh of processes that make one optimizer step together."""

    def shard(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model with its weights where this mesh keeps them; called before any optimizer is built."""
        ...

    def local(self, items: Sequence[T]) -> list[T]:
        """Return this process's own of the items of a step, which every process draws alike."""
        ...

    def sum(self, value: float) -> float:
        """Return the sum of a number over the processes that hold different items."""
        ...

    def gradient_scale(self) -> float:
        """Return the factor that makes the gradients, as this mesh reduces them, a sum over all processes."""
        ...


class OneProcess:
    """The identity: everything is here."""

    def shard(self, model: PreTrainedModel) -> PreTrainedModel:
        return model

    def local(self, items: Sequence[T]) -> list[T]:
        return list(items)

    def sum(self, value: float) -> float:
        return value

    def gradient_scale(self) -> float:
        return 1.0
