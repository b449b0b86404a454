"""The packed forward: hidden states that predict every response token of a group, from one pass over the prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.prefix.adapter import last_hidden
from opsdl.prefix.layouts.cached import RowsLayout
from opsdl.prefix.memory.cache import PrefixCache, check_prefix, prefill
from opsdl.prefix.responses import Ragged, Responses
from opsdl.prefix.tree import Segment, tree_hidden


def response_hidden(
    model: PreTrainedModel,
    prefix_ids: Tensor | Sequence[Tensor],
    responses: Responses | Sequence[Responses],
    *,
    prefix_gradient: str = "exact",
    prefix: PrefixCache | Sequence[PrefixCache] | None = None,
) -> Tensor | list[Tensor]:
    """Hidden states [G, T, H] after the final norm; [g, t] predicts response token t, the first one included.

    prefix_ids: [P] int64, at least 2 tokens. Slots outside `responses.mask` are 0. Sequences of prefixes, responses
    and caches give a list, whose groups all run in one pass.

    prefix_gradient="exact": equal to G separate rows to rounding, in value and in every gradient. Without `prefix` it
    is one stream of prefixes and rows (opsdl/prefix/tree.py); with a `prefix` from prefill(..., gradient=True) only the
    rows run, and the backward goes on through the graph of that prefill.
    "detached": the prefix's keys and values are constants, taken from `prefix` or from a prefill of their own; only
    the rows run, forward and backward, nothing of the prefix is kept for the backward and no dK and dV of it computed.
    The gradient lacks what the prefix positions contribute: cheaper, but the model learns less from the same steps
    (README, "Exact or detached").

    Raises ValueError for wrong shapes, an unknown mode, or "exact" with a cache that was made without gradient where
    gradients are on; StalePrefixError when the cache was made by other weights.
    """
    if prefix_gradient not in ("exact", "detached"):
        raise ValueError(f"prefix_gradient: {prefix_gradient!r}; expected 'exact' or 'detached'")
    single = isinstance(responses, Responses)
    prompts, groups = ([prefix_ids], [responses]) if single else (list(prefix_ids), list(responses))
    caches = [prefix] if isinstance(prefix, PrefixCache) else prefix
    if len(prompts) != len(groups) or (caches is not None and len(caches) != len(groups)):
        raise ValueError(f"prefix_ids: {len(prompts)} prefixes for {len(groups)} groups of responses; expected as many")
    for ids, group in zip(prompts, groups, strict=True):
        check_prefix(model, ids, max(group.lengths))
    exact_gradient = prefix_gradient == "exact" and torch.is_grad_enabled()
    if caches is None and prefix_gradient == "exact":
        hiddens = _packed(model, prompts, groups)
    else:
        caches = caches or [prefill(model, ids) for ids in prompts]
        for ids, cache in zip(prompts, caches, strict=True):
            _check_cache(model, ids, cache, exact_gradient)
        hiddens = _over_caches(model, caches, groups, detach=prefix_gradient == "detached")
    return hiddens[0] if single else hiddens


def _packed(model: PreTrainedModel, prompts: Sequence[Tensor], groups: Sequence[Responses]) -> list[Tensor]:
    """One stream of trees: of each prompt the prefix, without its last token, and the rows."""
    trees = [
        Segment(ids[:-1], [Segment(row[:n]) for row, n in zip(group.row_tokens(ids[-1]), group.lengths, strict=True)])
        for ids, group in zip(prompts, groups, strict=True)
    ]
    hidden, out = iter(tree_hidden(model, trees)), []
    for group in groups:
        next(hidden)  # of the prefix
        rows_NH = torch.cat([next(hidden) for _ in group.lengths])
        out.append(Ragged(group.mask).pad(rows_NH))
    return out


def _over_caches(
    model: PreTrainedModel, caches: Sequence[PrefixCache], groups: Sequence[Responses], detach: bool
) -> list[Tensor]:
    """The rows alone, of all groups in one stream, each over the cache of its prefix."""
    own = [Ragged(group.mask) for group in groups]
    tokens, positions, prefixes = [], [], []
    for cache, group, rows in zip(caches, groups, own, strict=True):
        tokens.append(rows.pack(group.row_tokens(cache.tokens[-1])))
        positions.append(rows.pack(_steps(group)) + cache.length - 1)
        layers = cache.layers
        if detach:
            layers = {layer: (key.detach(), value.detach()) for layer, (key, value) in layers.items()}
        prefixes.append((layers, len(tokens[-1])))
    every = Ragged.of([length for group in groups for length in group.lengths], caches[0].tokens.device)
    layout = RowsLayout(every, prefixes)
    hidden_1NH = last_hidden(model, torch.cat(tokens)[None], torch.cat(positions)[None], layout)
    parts = hidden_1NH[0].split([count for _, count in prefixes])
    return [rows.pad(part) for rows, part in zip(own, parts, strict=True)]


def _steps(responses: Responses) -> Tensor:
    """[G, T] the number of each token in its response."""
    return torch.arange(responses.tokens.shape[1], device=responses.tokens.device).expand_as(responses.tokens)


def _check_cache(model: PreTrainedModel, prefix_P: Tensor, cache: PrefixCache, exact_gradient: bool) -> None:
    cache.check(model)
    if not torch.equal(cache.tokens, prefix_P):
        raise ValueError("prefix: made from other tokens than prefix_ids")
    if exact_gradient and not cache.has_gradient:
        raise ValueError("prefix: made without gradient; expected prefix_gradient='detached' or no cache")
