"""The hidden states that predict every token of responses, each prefix computed once for all of its responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.prefix.adapter import last_hidden
from opsdl.prefix.layouts.cached import CachedLayout
from opsdl.prefix.memory.cache import PrefixCache
from opsdl.prefix.prefilling import check_prefix, prefill
from opsdl.prefix.responses import Responses
from opsdl.prefix.tree import Segment, stream_hidden


def packed_hidden(
    model: PreTrainedModel,
    prefix_ids: Sequence[Tensor],
    responses: Sequence[Responses],
    *,
    prefix_gradient: str = "exact",
    prefix: Sequence[PrefixCache] | None = None,
) -> Tensor:
    """Compute the hidden state that predicts each response token, in one pass (docs/design.md, "Shared prefix").

    "exact" equals a forward of its own for every response to rounding, in value and in every gradient. Without caches
    it is one stream of prefixes and responses; over caches from prefill(..., gradient=True) only the responses run, and
    the backward goes on through the graph of that prefill. "detached" takes the prefixes' keys and values as constants:
    nothing of a prefix is kept for the backward, and no dK and dV of it are computed. The gradient then lacks what the
    prefix's positions contribute: cheaper, but the model learns less from the same steps.

    Args:
        model: A causal language model with full attention in every layer.
        prefix_ids: The prefixes, int64 [P] each with P >= 2.
        responses: The group of responses of each prefix.
        prefix_gradient: "exact" or "detached".
        prefix: The caches of the prefixes; without them "detached" makes its own.

    Returns:
        [N, H] after the final norm, never padded: row n predicts token n of the groups' `packed_tokens`, group after
        group. The first token of a response is predicted by the last prefix token, and is included.

    Raises:
        ValueError: Wrong shapes, an unknown mode, or "exact" over a cache made without gradient where gradients are on.
        StalePrefixError: A cache was made by other weights.
        FreedSequenceError: A cache was freed.
    """
    if prefix_gradient not in ("exact", "detached"):
        raise ValueError(f"prefix_gradient: {prefix_gradient!r}; expected 'exact' or 'detached'")
    if not responses or len(prefix_ids) != len(responses) or (prefix is not None and len(prefix) != len(responses)):
        raise ValueError(
            f"prefix_ids: {len(prefix_ids)} prefixes for {len(responses)} groups of responses; expected as many"
        )
    for ids, group in zip(prefix_ids, responses, strict=True):
        check_prefix(model, ids, max(group.lengths))
    if prefix is None and prefix_gradient == "exact":
        return _in_one_stream(model, prefix_ids, responses)
    caches = prefix or [prefill(model, ids) for ids in prefix_ids]
    for ids, cache in zip(prefix_ids, caches, strict=True):
        _check_cache(model, ids, cache, prefix_gradient == "exact" and torch.is_grad_enabled())
    return _over_caches(model, caches, responses, detach=prefix_gradient == "detached")


@overload
def response_hidden(
    model: PreTrainedModel,
    prefix_ids: Tensor,
    responses: Responses,
    *,
    prefix_gradient: str = ...,
    prefix: PrefixCache | None = ...,
) -> Tensor: ...


@overload
def response_hidden(
    model: PreTrainedModel,
    prefix_ids: Sequence[Tensor],
    responses: Sequence[Responses],
    *,
    prefix_gradient: str = ...,
    prefix: Sequence[PrefixCache] | None = ...,
) -> list[Tensor]: ...


def response_hidden(
    model: PreTrainedModel,
    prefix_ids: Tensor | Sequence[Tensor],
    responses: Responses | Sequence[Responses],
    *,
    prefix_gradient: str = "exact",
    prefix: PrefixCache | Sequence[PrefixCache] | None = None,
) -> Tensor | list[Tensor]:
    """Compute what `packed_hidden` does, padded (docs/design.md, "Shared prefix").

    Args:
        model: A causal language model with full attention in every layer.
        prefix_ids: int64 [P] with P >= 2, or a sequence of prefixes.
        responses: The prefix's group of responses, or a sequence of groups, which all run in one pass.
        prefix_gradient: "exact" or "detached", as in `packed_hidden`.
        prefix: The cache of the prefix, or a sequence of caches.

    Returns:
        Hidden states [G, T, H] after the final norm, of which [g, t] predicts token t of response g, the first one
        included; 0 where the mask is False. A list of them for a sequence of groups.

    Raises:
        ValueError: As `packed_hidden`; so are the other errors.
    """
    prompts = [prefix_ids] if isinstance(prefix_ids, Tensor) else prefix_ids
    groups = [responses] if isinstance(responses, Responses) else responses
    caches = [prefix] if isinstance(prefix, PrefixCache) else prefix
    packed_NH = packed_hidden(model, prompts, groups, prefix_gradient=prefix_gradient, prefix=caches)
    parts = packed_NH.split([sum(group.lengths) for group in groups])
    hiddens = [group.pad(part) for group, part in zip(groups, parts, strict=True)]
    return hiddens[0] if isinstance(responses, Responses) else hiddens


def _in_one_stream(model: PreTrainedModel, prompts: Sequence[Tensor], groups: Sequence[Responses]) -> Tensor:
    """A tree for each prefix: the prefix without its last token, then the responses."""
    trees = [
        Segment(ids[:-1], [Segment(tokens) for tokens in group.inputs(ids[-1]).split(group.lengths)])
        for ids, group in zip(prompts, groups, strict=True)
    ]
    hidden_LH, spans = stream_hidden(model, trees)
    of_responses = [hidden_LH[span.end : span.last] for span in spans if span.last > span.end]
    return of_responses[0] if len(of_responses) == 1 else torch.cat(of_responses)


def _over_caches(
    model: PreTrainedModel, caches: Sequence[PrefixCache], groups: Sequence[Responses], *, detach: bool
) -> Tensor:
    """The responses alone, of all groups in one stream, each over the cache of its prefix."""
    pairs = list(zip(caches, groups, strict=True))
    tokens_N = torch.cat([group.inputs(cache.tokens[-1]) for cache, group in pairs])
    positions_N = torch.cat([group.positions(cache.length - 1) for cache, group in pairs])
    layout = CachedLayout(caches, [group.lengths for group in groups], detach=detach)
    return last_hidden(model, tokens_N[None], positions_N[None], layout)[0]


def _check_cache(model: PreTrainedModel, prefix_P: Tensor, cache: PrefixCache, exact_gradient: bool) -> None:
    cache.check(model)
    if not torch.equal(cache.tokens, prefix_P):
        raise ValueError("prefix: made from other tokens than prefix_ids")
    if exact_gradient and not cache.has_gradient:
        raise ValueError("prefix: made without gradient; expected prefix_gradient='detached' or no cache")
