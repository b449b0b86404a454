"""The keys and values of one prefix, made once and used by rollout, student and teacher.

    cache = prefill(model, prefix_ids)                    # [P] token ids
    responses = generate(model, cache, num_responses=8, ...)
    hidden_GTH = response_hidden(model, prefix_ids, responses, prefix_gradient="detached", prefix=cache)

The cache holds the first P - 1 tokens; the last one starts every row (opsdl/prefix/rows.py), because its output
predicts the first response token and must be computed with the rest of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.prefix.adapter import last_hidden
from opsdl.prefix.layouts.cached import ExtendLayout, PrefixLayout
from opsdl.prefix.memory.pool import KeyValuePool
from opsdl.prefix.responses import KeyValue, Ragged


class StalePrefixError(RuntimeError):
    """The weights changed after the prefix cache was made."""


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values [1, Hkv, P - 1, D] of every layer, and the version of the weights that made them.

    They are tensors of its own, or lie in the blocks of a pool (`prefill(..., pool=pool)`) until `free`.
    """

    tokens: Tensor  # [P] int64
    own_layers: dict[int, KeyValue] | None  # None in a pool
    weights_version: int
    pool: KeyValuePool | None = None
    sequence: int | None = None

    @property
    def layers(self) -> dict[int, KeyValue]:
        """By layer. Raises FreedSequence after `free`."""
        return self.own_layers if self.pool is None else self.pool.layers(self.sequence)

    @property
    def length(self) -> int:
        return self.tokens.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in self.layers.values() for x in pair)

    @property
    def has_gradient(self) -> bool:
        """Whether a backward over these keys and values reaches the prefix."""
        return any(key.requires_grad for key, _ in self.layers.values())

    def free(self) -> None:
        """Give the blocks back to the pool; forks keep what they share. Raises FreedSequence the second time."""
        if self.pool is not None:
            self.pool.free([self.sequence])

    def check(self, model: PreTrainedModel) -> None:
        """Raises StalePrefixError when `model` is not the model, or its weights not the weights, of this cache."""
        if weights_version(model) != self.weights_version:
            raise StalePrefixError(
                "prefix cache: made by other weights than the model has now (another model, or an optimizer step"
                " since); call prefill again"
            )


def weights_version(model: PreTrainedModel) -> int:
    """Changes whenever a parameter is modified in place or replaced: autograd counts in-place writes per tensor."""
    return hash(tuple((p.data_ptr(), p._version) for p in model.parameters()))


def check_prefix(model: PreTrainedModel, prefix_ids: Tensor, new_tokens: int = 0) -> None:
    """Raises ValueError unless `prefix_ids` is int64 [P], P >= 2, and P + new_tokens fits the model's context."""
    if prefix_ids.ndim != 1 or prefix_ids.dtype != torch.int64 or prefix_ids.shape[0] < 2:
        raise ValueError(
            f"prefix_ids: expected int64 [P] with P >= 2, found {prefix_ids.dtype} {tuple(prefix_ids.shape)}"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prefix_ids.shape[0] + new_tokens > limit:
        raise ValueError(
            f"prefix_ids: {prefix_ids.shape[0]} tokens and {new_tokens} response tokens exceed the model's context of"
            f" {limit}"
        )


def prefill(
    model: PreTrainedModel, prefix_ids: Tensor, *, gradient: bool = False, pool: KeyValuePool | None = None
) -> PrefixCache:
    """Run the prefix [P] through the model once. Design, "Shared prefix".

    gradient=True keeps the graph of this one pass: rollouts read the keys and values, then `response_hidden` runs the
    rows over them and its backward goes through the prefix, so no second forward of the prefix is needed. The graph
    lives as long as the cache, and activation checkpointing must be off.

    pool: keep the keys and values in its blocks. It holds no graph, so not with gradient=True.

    Raises OutOfBlocks when the pool has no room left, ValueError for a wrong shape or dtype, a prefix longer than the
    model's context, or a model with layers that keep no keys and values.
    """
    check_prefix(model, prefix_ids)
    _check_gradient(model, gradient)
    if gradient and pool is not None:
        raise ValueError("pool: given with gradient=True; expected one of the two, a pool holds no graph")
    layout = PrefixLayout()
    with torch.set_grad_enabled(gradient):
        last_hidden(
            model, prefix_ids[None, :-1], torch.arange(len(prefix_ids) - 1, device=prefix_ids.device)[None], layout
        )
    if len(layout.layers) != model.config.num_hidden_layers:
        raise ValueError(
            f"model: {len(layout.layers)} of {model.config.num_hidden_layers} layers keep keys and values; a shared"
            " prefix needs attention in every layer"
        )
    version = weights_version(model)
    if pool is None:
        return PrefixCache(prefix_ids, layout.layers, version)
    return PrefixCache(prefix_ids, None, version, pool, pool.store(layout.layers))


def extend(
    model: PreTrainedModel, parent: PrefixCache, prefixes: Sequence[Tensor], *, gradient: bool = False
) -> list[PrefixCache]:
    """Caches of several prefixes [P_i] that all begin with the parent's tokens; only what follows runs, in one pass.

    So questions about one document share its prefill, and with gradient=True, and a parent made with it, its backward.
    Each cache holds its own copy of the parent's keys and values.

    Raises ValueError as `prefill`, and for a prefix that is not longer than the parent or begins otherwise;
    StalePrefixError for a parent made by other weights.
    """
    parent.check(model)
    _check_gradient(model, gradient)
    for ids in prefixes:
        check_prefix(model, ids)
        if parent.length >= len(ids) or not torch.equal(parent.tokens, ids[: parent.length]):
            raise ValueError(f"prefixes: {len(ids)} tokens; expected the parent's {parent.length} and more after them")
    start = parent.length - 1
    rows = Ragged.of([len(ids) - 1 - start for ids in prefixes], parent.tokens.device)
    positions_N = torch.cat([torch.arange(start, len(ids) - 1, device=ids.device) for ids in prefixes])
    layout = ExtendLayout(rows, parent.layers)
    with torch.set_grad_enabled(gradient):
        last_hidden(model, torch.cat([ids[start:-1] for ids in prefixes])[None], positions_N[None], layout)
    return [
        PrefixCache(ids, layers, parent.weights_version) for ids, layers in zip(prefixes, layout.layers, strict=True)
    ]


def _check_gradient(model: PreTrainedModel, gradient: bool) -> None:
    if gradient and model.is_activation_checkpointing:
        raise ValueError("gradient: True with activation checkpointing on; expected one of the two")
