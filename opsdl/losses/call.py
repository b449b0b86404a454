"""One call of a loss: what the public functions make of their arguments, and all that operators and engines read.

The fields of `Call` are the arguments of the operators in torch.ops.opsdl, whose schema follows from their types.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple, cast, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor

from opsdl.losses.shards import Shards
from opsdl.losses.teacher import Head, OwnHead, SharedHead
from opsdl.losses.values import Value, statistic_names


class Wanted(NamedTuple):
    """Which gradients a call computes."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """The gradients of a call, None where one is not wanted."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a loss with checked arguments, flat, hidden states in the dtype of the matrix products.

    V is the number of this rank's vocabulary entries, padding included.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    teacher_hidden_NK: Tensor | None  # None where the value needs no teacher
    teacher_weight_VK: Tensor | None  # None where the teacher uses the student's head, with its bias
    teacher_bias_V: Tensor | None
    tokens_N: Tensor | None  # the sampled ones
    scale_N: Tensor  # the factor of each token's value in the reduced loss; 0 where it is masked
    value: Value
    temperature: float
    softcap: float | None
    beta: float
    clip: float | None
    skip_tolerance: float  # relative; 0 is exact
    vocab_size: int  # entries of this rank that are no padding
    group: str  # name of the process group over which the vocabulary is sharded, or ""
    backend: str
    wanted: Wanted
    yielded: bool = True  # nobody else holds the gradients that the operator returns: its backward may overwrite them

    def flat(self) -> tuple[Any, ...]:
        """Return the arguments of the operators."""
        given = [getattr(self, name) for name in FIELDS]
        return tuple(x.value if isinstance(x, Value) else list(x) if isinstance(x, Wanted) else x for x in given)

    @classmethod
    def unflat(cls, arguments: Iterable[Any]) -> Call:
        """Return the call that `flat` gave the arguments of."""
        named = dict(zip(FIELDS, arguments, strict=True))
        return cls(**(named | {"value": Value(named["value"]), "wanted": Wanted(*named["wanted"])}))

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors that get a gradient, in the order of `Wanted` and `Gradients`: the first fields."""
        return self.hidden_NH, self.weight_VH, self.bias_V

    @cached_property
    def head(self) -> Head:
        """The student's head without its padding."""
        return self._head(self.weight_VH, self.bias_V)

    @cached_property
    def second(self) -> SharedHead | OwnHead | None:
        """Where the teacher's part in every tile comes from; None without a teacher."""
        if self.teacher_hidden_NK is None:
            return None
        if self.teacher_weight_VK is None:
            return SharedHead(self.hidden_NH, self.teacher_hidden_NK, self.head)
        return OwnHead(self.teacher_hidden_NK, self._head(self.teacher_weight_VK, self.teacher_bias_V))

    def _head(self, weight_VH: Tensor, bias_V: Tensor | None) -> Head:
        entries = slice(self.vocab_size)
        return Head(weight_VH[entries], None if bias_V is None else bias_V[entries], self.temperature, self.softcap)

    @cached_property
    def shards(self) -> Shards:
        """Where this rank's entries lie in the vocabulary. Every rank takes part in finding out, once a call."""
        group = None
        if self.group:
            name = cast("dist.distributed_c10d.GroupName", self.group)
            group = dist.distributed_c10d._resolve_process_group(name)
        return Shards.of(self.vocab_size, group, self.hidden_NH.device)

    @property
    def padding(self) -> int:
        """Entries of the student's head after the vocabulary: they have no logits, and zero gradient."""
        return self.weight_VH.shape[0] - self.vocab_size

    @property
    def wide(self) -> torch.dtype:
        """The dtype of everything that is no operand of a matrix product."""
        return torch.float64 if self.hidden_NH.dtype == torch.float64 else torch.float32

    @property
    def grad_dtypes(self) -> list[torch.dtype]:
        """`kept` of the dtypes of dHidden, dWeight and dBias."""
        hidden, weight, bias = self.differentiable
        return [kept(x.dtype) for x in (hidden, weight, weight if bias is None else bias)]

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the statistics that the call reports, in order."""
        return statistic_names(self.value, self.tokens_N is not None, self.skip_tolerance > 0)

    def local_tokens(self, index_n: Tensor) -> Tensor | None:
        """Return the entry of this rank's head that each token is; outside the head where another rank has it."""
        return None if self.tokens_N is None else self.tokens_N[index_n] - self.shards.start


FIELDS = tuple(field.name for field in fields(Call))
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", float | None: "float?", int: "int", bool: "bool",
    str: "str", Value: "str", Wanted: "bool[]",
}  # fmt: skip


def schema() -> str:
    """Return the arguments of an operator that takes a call, in torch's notation."""
    hints = get_type_hints(Call)
    return ", ".join(f"{_SCHEMA_TYPES[hints[name]]} {name}" for name in FIELDS)


def kept(dtype: torch.dtype) -> torch.dtype:
    """dtype in which a gradient waits for the factor that the backward brings: float16 might have lost it by then."""
    return torch.float32 if dtype == torch.float16 else dtype
