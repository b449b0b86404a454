"""The keys and values of one prefix, made once and used by rollout, student and teacher.

    cache = prefill(model, prefix_ids)                    # [P] token ids
    responses = generate(model, cache, num_responses=8, ...)
    hidden_GTH = response_hidden(model, prefix_ids, responses, prefix_gradient="detached", prefix=cache)

The cache holds the first P - 1 tokens; the last one starts every row (opsdl/prefix/rows.py), because its output
predicts the first response token and must be computed with the rest of the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.prefix.attention import last_hidden
from opsdl.prefix.layout import ExtendLayout, KeyValue, PrefixLayout


class StalePrefixError(RuntimeError):
    """The weights changed after the prefix cache was made."""


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values [1, Hkv, P - 1, D] of every layer, and the version of the weights that made them."""

    tokens: Tensor  # [P] int64
    layers: dict[int, KeyValue]
    weights_version: int

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
    model: PreTrainedModel, prefix_ids: Tensor, *, gradient: bool = False, parent: PrefixCache | None = None
) -> PrefixCache:
    """Run the prefix [P] through the model once. Design, "Shared prefix".

    With `parent`, the cache of a beginning of `prefix_ids`, only the tokens after that beginning run: questions about
    one document share the document. The new cache holds its own copy of the parent's keys and values.

    gradient=True keeps the graph of this one pass: rollouts read the keys and values, then `response_hidden` runs the
    rows over them and its backward goes through the prefix, so no second forward of the prefix is needed. The graph
    lives as long as the cache, and activation checkpointing must be off. A parent made with gradient passes it on.

    Raises ValueError for a wrong shape or dtype, a prefix longer than the model's context, a parent that is not a
    shorter beginning of it, or a model with layers that keep no keys and values; StalePrefixError for a parent made by
    other weights.
    """
    check_prefix(model, prefix_ids)
    if gradient and model.is_activation_checkpointing:
        raise ValueError("gradient: True with activation checkpointing on; expected one of the two")
    start, layout = 0, PrefixLayout()
    if parent is not None:
        parent.check(model)
        if parent.length >= len(prefix_ids) or not torch.equal(parent.tokens, prefix_ids[: parent.length]):
            raise ValueError(f"parent: {parent.length} tokens; expected a beginning of the {len(prefix_ids)} prefix_ids")
        start = parent.length - 1
        layout = ExtendLayout(prefix_ids.shape[0] - 1 - start, parent.layers, prefix_ids.device)
    positions_BL = torch.arange(start, prefix_ids.shape[0] - 1, device=prefix_ids.device)[None]
    with torch.set_grad_enabled(gradient):
        last_hidden(model, prefix_ids[None, start:-1], positions_BL, layout)
    if len(layout.layers) != model.config.num_hidden_layers:
        raise ValueError(
            f"model: {len(layout.layers)} of {model.config.num_hidden_layers} layers keep keys and values; a shared"
            " prefix needs attention in every layer"
        )
    return PrefixCache(prefix_ids, layout.layers, weights_version(model))
