"""Running a prefix through the model, once: alone, or as a continuation of a prefix that was.

cache = prefill(model, prefix_ids)                    # [P] token ids
responses = generate(model, cache, num_responses=8, ...)
hidden_GTH = response_hidden(model, prefix_ids, responses, prefix_gradient="detached", prefix=cache)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.models import checkpoints_activations, context_limit
from opsdl.prefix.adapter import last_hidden
from opsdl.prefix.layouts.cached import ExtendLayout, PrefixLayout
from opsdl.prefix.memory.blocks import OutOfBlocksError
from opsdl.prefix.memory.cache import OwnPart, PooledPart, PrefixCache, weights_version
from opsdl.prefix.memory.pool import KeyValuePool


def prefill(
    model: PreTrainedModel, prefix_ids: Tensor, *, gradient: bool = False, pool: KeyValuePool | None = None
) -> PrefixCache:
    """Run a prefix through the model once (docs/design.md, "Shared prefix").

    Args:
        model: A causal language model with full attention in every layer.
        prefix_ids: int64 [P], at least 2 tokens.
        gradient: Whether to keep the graph of this one pass: rollouts read the keys and values, then `response_hidden`
            runs the responses over them and its backward goes through the prefix, so no second forward of the prefix is
            needed. The graph lives as long as the cache.
        pool: Where to keep the keys and values, in blocks, instead of in tensors of their own. A pool holds no graph.

    Returns:
        The keys and values of all but the last token.

    Raises:
        OutOfBlocksError: The pool has no room left.
        ValueError: A wrong shape or dtype, a prefix longer than the model's context, a model with layers that keep no
            keys and values, or gradient=True with activation checkpointing or with a pool.
    """
    check_prefix(model, prefix_ids)
    _check_gradient(model, gradient)
    if gradient and pool is not None:
        raise ValueError("pool: given with gradient=True; expected one of the two, a pool holds no graph")
    tokens, device = prefix_ids[:-1], prefix_ids.device
    layout = PrefixLayout(len(tokens), device)
    with torch.set_grad_enabled(gradient):
        last_hidden(model, tokens[None], torch.arange(len(tokens), device=device)[None], layout)
    if len(layout.layers) != model.config.num_hidden_layers:
        raise ValueError(
            f"model: {len(layout.layers)} of {model.config.num_hidden_layers} layers keep keys and values; a shared"
            " prefix needs attention in every layer"
        )
    part = OwnPart(layout.layers) if pool is None else PooledPart(pool, pool.store(layout.layers))
    return PrefixCache(prefix_ids, (part,), weights_version(model))


def extend(
    model: PreTrainedModel, parent: PrefixCache, prefixes: Sequence[Tensor], *, gradient: bool = False
) -> list[PrefixCache]:
    """Continue one prefix to several: caches of prefixes that all begin with the parent's tokens, in one pass.

    So questions about one document share its prefill and, with gradient, its backward. Only the tokens after the
    parent's run, and only theirs are the keys and values that each cache adds: the parent's it shares, which stay
    though the parent is freed. They lie in tensors of their own or in a pool, as the parent's do.

    Args:
        model: The model that made the parent.
        parent: The cache of P tokens, from `prefill` or `extend`.
        prefixes: int64 [P_i] each, longer than the parent.
        gradient: Whether to keep the graph of this pass; the parent must have kept its own.

    Returns:
        A cache for each of the prefixes.

    Raises:
        StalePrefixError: The parent was made by other weights.
        FreedSequenceError: The parent was freed.
        OutOfBlocksError: The parent's pool has no room left.
        ValueError: As `prefill`; a prefix that is not longer than the parent or begins otherwise; gradient=True with a
            parent made without.
    """
    parent.check(model)
    _check_gradient(model, gradient)
    if gradient and not parent.has_gradient:
        raise ValueError("parent: made without gradient; expected prefill(..., gradient=True), or gradient=False")
    for ids in prefixes:
        check_prefix(model, ids)
        if parent.length >= len(ids) or not torch.equal(parent.tokens, ids[: parent.length]):
            raise ValueError(f"prefixes: {len(ids)} tokens; expected the parent's {parent.length} and more after them")
    start = parent.length - 1
    positions_N = torch.cat([torch.arange(start, len(ids) - 1, device=ids.device) for ids in prefixes])
    layout = ExtendLayout(parent, [len(ids) - 1 - start for ids in prefixes])
    with torch.set_grad_enabled(gradient):
        last_hidden(model, torch.cat([ids[start:-1] for ids in prefixes])[None], positions_N[None], layout)
    caches: list[PrefixCache] = []
    try:
        for ids, layers in zip(prefixes, layout.own, strict=True):
            caches.append(parent.continued(ids, layers))
    except OutOfBlocksError:
        for cache in caches:
            cache.free()
        raise
    return caches


def check_prefix(model: PreTrainedModel, prefix_ids: Tensor, new_tokens: int = 0) -> None:
    """Raise ValueError unless `prefix_ids` is int64 [P], P >= 2, and P + new_tokens fits the model's context."""
    if prefix_ids.ndim != 1 or prefix_ids.dtype != torch.int64 or prefix_ids.shape[0] < 2:
        raise ValueError(
            f"prefix_ids: expected int64 [P] with P >= 2, found {prefix_ids.dtype} {tuple(prefix_ids.shape)}"
        )
    limit = context_limit(model)
    if limit is not None and prefix_ids.shape[0] + new_tokens > limit:
        raise ValueError(
            f"prefix_ids: {prefix_ids.shape[0]} tokens and {new_tokens} response tokens exceed the model's context of"
            f" {limit}"
        )


def _check_gradient(model: PreTrainedModel, gradient: bool) -> None:
    if gradient and checkpoints_activations(model):
        raise ValueError("gradient: True with activation checkpointing on; expected one of the two")
