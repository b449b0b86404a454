"""The packed forward: hidden states that predict every response token of a group, from one pass over the prefix."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.prefix.attention import last_hidden
from opsdl.prefix.cache import PrefixCache, check_prefix, prefill
from opsdl.prefix.layout import RowsLayout
from opsdl.prefix.rows import Responses


def response_hidden(
    model: PreTrainedModel,
    prefix_ids: Tensor,
    responses: Responses,
    *,
    prefix_gradient: str = "exact",
    prefix: PrefixCache | None = None,
) -> Tensor:
    """Hidden states [G, T, H] after the final norm; [g, t] predicts response token t, the first one included.

    prefix_ids: [P] int64, at least 2 tokens. Slots outside `responses.mask` are 0.

    prefix_gradient="exact": equal to G separate rows to rounding, in value and in every gradient. Without `prefix` it
    is one stream [prefix ; row 1 ; ... ; row G]; with a `prefix` from prefill(..., gradient=True) only the rows run,
    and the backward goes on through the graph of that prefill.
    "detached": the prefix's keys and values are constants, taken from `prefix` or from a prefill of their own; only
    the rows run, forward and backward, and the gradient lacks what the prefix positions contribute.

    Raises ValueError for wrong shapes, an unknown mode, or "exact" with a cache that was made without gradient where
    gradients are on; StalePrefixError when the cache was made by other weights.
    """
    lengths = responses.lengths
    check_prefix(model, prefix_ids, max(lengths))
    if prefix_gradient not in ("exact", "detached"):
        raise ValueError(f"prefix_gradient: {prefix_gradient!r}; expected 'exact' or 'detached'")
    if prefix is not None:
        prefix.check(model)
        if not torch.equal(prefix.tokens, prefix_ids):
            raise ValueError("prefix: made from other tokens than prefix_ids")
        if prefix_gradient == "exact" and torch.is_grad_enabled() and not prefix.has_gradient:
            raise ValueError("prefix: made without gradient; expected prefix_gradient='detached' or no cache")
    elif prefix_gradient == "detached":
        prefix = prefill(model, prefix_ids)
    cached = None if prefix is None else prefix.layers
    if cached is not None and prefix_gradient == "detached":
        cached = {layer: (key.detach(), value.detach()) for layer, (key, value) in cached.items()}

    head = prefix_ids[:-1] if prefix is None else prefix_ids[:0]
    layout = RowsLayout(responses.mask, head.shape[0], cached)
    row_tokens_N = layout.rows.pack(responses.row_tokens(prefix_ids[-1]))
    steps_GT = torch.arange(responses.tokens.shape[1], device=prefix_ids.device).expand_as(responses.tokens)
    row_positions_N = layout.rows.pack(steps_GT) + prefix_ids.shape[0] - 1
    hidden_1LH = last_hidden(
        model,
        torch.cat([head, row_tokens_N])[None],
        torch.cat([torch.arange(head.shape[0], device=head.device), row_positions_N])[None],
        layout,
    )
    return layout.rows.pad(hidden_1LH[0, head.shape[0] :])
