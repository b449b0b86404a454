"""Rollouts: many responses decoded together from prefixes that are each stored once and read once a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.errors import UserError
from opsdl.prefix.adapter import last_hidden
from opsdl.prefix.layouts.decode import DecodeLayout
from opsdl.prefix.memory.cache import PrefixCache
from opsdl.prefix.prefilling import check_prefix
from opsdl.prefix.responses import Responses


@overload
def generate(
    model: PreTrainedModel,
    prefix: PrefixCache,
    *,
    num_responses: int = ...,
    max_new_tokens: int,
    temperature: float = ...,
    top_p: float = ...,
    eos_token_id: int | Iterable[int],
    generator: torch.Generator | None = ...,
) -> Responses: ...


@overload
def generate(
    model: PreTrainedModel,
    prefix: Sequence[PrefixCache],
    *,
    num_responses: int = ...,
    max_new_tokens: int,
    temperature: float = ...,
    top_p: float = ...,
    eos_token_id: int | Iterable[int],
    generator: torch.Generator | None = ...,
) -> list[Responses]: ...


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prefix: PrefixCache | Sequence[PrefixCache],
    *,
    num_responses: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_token_id: int | Iterable[int],
    generator: torch.Generator | None = None,
) -> Responses | list[Responses]:
    """Decode responses of each prefix, all of them in one batch (docs/design.md, "Shared prefix").

    What prefixes share is held once, and read once a step. The responses' own keys and values lie in blocks of the
    prefixes' pool, or of one for this call; the blocks of a response that ends are free at once.

    Args:
        model: The model that made the prefixes.
        prefix: The cache to continue, or a sequence of caches.
        num_responses: How many responses of each prefix, G.
        max_new_tokens: The most tokens of a response.
        temperature: The divisor of the logits; 0 is greedy.
        top_p: The probability of the smallest set of tokens to sample from, in (0, 1].
        eos_token_id: The tokens, the first of which to come ends a response and belongs to it.
        generator: Where the randomness comes from; torch's default one if None.

    Returns:
        Responses [G, T] with log-probabilities for one prefix, a list of them for a sequence; T is the length of the
        longest response of the call, and tokens after an end are the smallest of `eos_token_id`.

    Raises:
        StalePrefixError: The weights have changed since a prefix was made.
        FreedSequenceError: A prefix was freed.
        OutOfBlocksError: The prefixes' pool has no room left.
        UserError: The model's logits are not finite.
        ValueError: Arguments out of range, or more tokens than the model's context.
    """
    prefixes = [prefix] if isinstance(prefix, PrefixCache) else list(prefix)
    ends = sorted({eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id))
    _check_arguments(num_responses, max_new_tokens, temperature, top_p, ends, prefixes)
    for cache in prefixes:
        cache.check(model)
        check_prefix(model, cache.tokens, max_new_tokens)
    padded = _decode(
        model, prefixes, num_responses, max_new_tokens, ends, lambda x: _sample(x, temperature, top_p, generator)
    )
    parts = zip(*(x.split(num_responses) for x in padded), strict=True)
    groups = [Responses(*part) for part in parts]
    return groups[0] if isinstance(prefix, PrefixCache) else groups


def _decode(
    model: PreTrainedModel,
    prefixes: Sequence[PrefixCache],
    count: int,
    max_new_tokens: int,
    ends: Sequence[int],
    sample: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and log-probabilities [R, T] of `count` responses of each prefix."""
    device = prefixes[0].tokens.device
    ends_E = torch.tensor(ends, device=device)
    last_A = torch.stack([cache.tokens[-1] for cache in prefixes]).repeat_interleave(count)
    positions_R = torch.tensor([cache.length - 1 for cache in prefixes], device=device).repeat_interleave(count)
    shape = (len(prefixes) * count, max_new_tokens)
    tokens_RT = torch.full(shape, ends[0], device=device)
    mask_RT = torch.zeros(shape, dtype=torch.bool, device=device)
    log_probs_RT = torch.zeros(shape, device=device)
    alive_A = torch.arange(shape[0], device=device)  # responses still growing; only they are computed
    logits = _head(model)
    with DecodeLayout(prefixes, count, max_new_tokens) as layout:
        for step in range(max_new_tokens):
            layout.grow()
            hidden_A1H = last_hidden(model, last_A[:, None], positions_R[alive_A, None] + step, layout)
            logits_AV = logits(hidden_A1H[:, 0])
            if not logits_AV.amax(-1).isfinite().all():
                raise UserError(f"generate: the logits of response token {step} are not finite; expected sound weights")
            last_A = sample(logits_AV)
            tokens_RT[alive_A, step] = last_A
            mask_RT[alive_A, step] = True
            log_probs_RT[alive_A, step] = logits_AV.log_softmax(-1).gather(1, last_A[:, None])[:, 0]
            goes_on = ~torch.isin(last_A, ends_E)
            if not goes_on.all():
                layout.keep(goes_on)
                alive_A, last_A = alive_A[goes_on], last_A[goes_on]
            if not len(alive_A):
                break
    length = int(mask_RT.any(0).sum())
    return tokens_RT[:, :length], mask_RT[:, :length], log_probs_RT[:, :length]


def _head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """A function from hidden states [R, H] to float32 logits [R, V], soft-capped where the model does that."""
    head = model.get_output_embeddings()
    weight_VH, bias_V = head.weight.float(), None if head.bias is None else head.bias.float()  # once for all steps
    softcap = getattr(model.config, "final_logit_softcapping", None)

    def logits(hidden_RH: Tensor) -> Tensor:
        with torch.autocast(hidden_RH.device.type, enabled=False):
            logits_RV = torch.nn.functional.linear(hidden_RH.float(), weight_VH, bias_V)
        return logits_RV if softcap is None else softcap * torch.tanh(logits_RV / softcap)

    return logits


def _sample(logits_RV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits_RV.argmax(-1)
    probabilities = (logits_RV / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the tokens ranked higher: the first token always stays
        probabilities = torch.zeros_like(ordered).scatter(1, order, ordered.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _check_arguments(
    num_responses: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    ends: Sequence[int],
    prefixes: Sequence[PrefixCache],
) -> None:
    for name, value in (("num_responses", num_responses), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}: {value}; expected at least 1")
    if temperature < 0:
        raise ValueError(f"temperature: {temperature}; expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p}; expected a number in (0, 1]")
    if not ends:
        raise ValueError("eos_token_id: empty; expected at least one token id")
    if not prefixes:
        raise ValueError("prefix: an empty sequence; expected at least one PrefixCache")
