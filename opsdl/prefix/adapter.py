"""Attention that knows a shared prefix, as a transformers attention function.

Every layer but attention is token-wise, so a packed stream of many responses only needs attention to know which
tokens see which. Models call the function registered here under the name `opsdl_shared_prefix`; the layout of the
stream (opsdl/prefix/layouts) travels as the keyword `shared_prefix` of the model call and survives activation
checkpointing. Without that keyword the function is torch's scaled dot-product attention, so an attached model keeps
working everywhere else.

    attach(model)                 # every forward of this model goes through the function
    detach(model)                 # back to what it was
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from opsdl.prefix.layouts.base import Layout

NAME = "opsdl_shared_prefix"


def attach(model: PreTrainedModel) -> None:
    """Route the model's attention through the shared-prefix function; `detach` undoes it. Doing it twice is harmless.

    Args:
        model: A transformers model; ordinary calls of it give what they gave before.

    Raises:
        ValueError: The model does not take its attention from transformers' AttentionInterface.
    """
    if model.config._attn_implementation == NAME:
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(f"model {type(model).__name__} does not take its attention from AttentionInterface")
    model._opsdl_attention_before = before


def detach(model: PreTrainedModel) -> None:
    """Give the model back the attention it had before `attach`.

    Args:
        model: A transformers model; one that is not attached stays as it is.
    """
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(str(model._opsdl_attention_before))
        del model._opsdl_attention_before


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared_prefix: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend by transformers' contract: query [B, Hq, L, D], key and value [B, Hkv, L, D] -> out [B, L, Hq, D]."""
    if shared_prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"shared prefix: layer {module.layer_idx} has a sliding window; only full attention is supported"
        )
    if kwargs.get("softcap") is not None:
        raise ValueError(
            f"shared prefix: layer {module.layer_idx} soft-caps its attention scores, which is not supported"
        )
    if dropout:
        raise ValueError(f"shared prefix: attention dropout is {dropout}; a packed stream supports 0 only")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    # Under autocast the rotary embedding leaves queries and keys in float32 while values are in the low precision.
    out = shared_prefix.attend(module.layer_idx, query.to(value.dtype), key.to(value.dtype), value, scaling)
    return out.transpose(1, 2), None


def _check_layers(model: PreTrainedModel) -> None:
    """Raise ValueError for layers that pass something on from token to token otherwise than by full attention."""
    for layer, kind in enumerate(getattr(model.config, "layer_types", None) or ()):
        if kind != "full_attention":
            what = "has a sliding window" if "sliding" in kind else f"is {kind}"
            raise ValueError(f"shared prefix: layer {layer} {what}; only full attention is supported")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def last_hidden(model: PreTrainedModel, tokens_BL: Tensor, positions_BL: Tensor, layout: Layout) -> Tensor:
    """The last hidden states [B, L, H] (after the final norm, before the head) of tokens with the given layout."""
    _check_layers(model)
    attach(model)
    # An empty 4D mask is passed through untouched: the layout alone says who sees whom. Without it transformers
    # would cut the stream wherever positions restart.
    no_mask = torch.empty(1, 1, 0, 0, device=tokens_BL.device)
    return model.base_model(
        input_ids=tokens_BL,
        position_ids=positions_BL,
        attention_mask=no_mask,
        use_cache=False,
        shared_prefix=layout,
    ).last_hidden_state
