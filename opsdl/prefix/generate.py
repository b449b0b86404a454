"""Rollouts: many responses decoded together from prefixes that are each stored once and read once a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.errors import UserError
from opsdl.prefix.adapter import last_hidden
from opsdl.prefix.layouts.decode import DecodeLayout
from opsdl.prefix.memory.cache import PrefixCache, check_prefix
from opsdl.prefix.responses import Responses


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
    """Decode `num_responses` responses of each prefix, all rows in one batch.

    Each prefix is held once, and read once a step. The rows' own keys and values lie in blocks of the prefixes' pool,
    or of one for this call; the blocks of a row that ends are free at once.

    temperature 0 is greedy; top_p keeps the smallest set of tokens with that much probability. A row ends with the
    first of `eos_token_id`, which belongs to the response, or after `max_new_tokens`.

    Returns Responses [G, T] for one prefix, a list of them for a sequence of prefixes; T is the length of the longest
    response of the call, and tokens after an end are the first of `eos_token_id`.
    Raises ValueError for arguments out of range, StalePrefixError when the weights have changed, OutOfBlocks when the
    prefixes' pool has no room left, UserError when the model's logits are not finite.
    """
    prefixes = [prefix] if isinstance(prefix, PrefixCache) else list(prefix)
    ends = sorted({eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id))
    _check_arguments(num_responses, max_new_tokens, temperature, top_p, ends, prefixes)
    for cache in prefixes:
        cache.check(model)
        check_prefix(model, cache.tokens, max_new_tokens)

    device = prefixes[0].tokens.device
    ends_E = torch.tensor(ends, device=device)
    last_R = torch.stack([cache.tokens[-1] for cache in prefixes]).repeat_interleave(num_responses)
    positions_R = torch.tensor([cache.length - 1 for cache in prefixes], device=device).repeat_interleave(num_responses)
    shape = (len(prefixes) * num_responses, max_new_tokens)
    tokens_RT = torch.full(shape, ends[0], device=device)
    mask_RT = torch.zeros(shape, dtype=torch.bool, device=device)
    log_probs_RT = torch.zeros(shape, device=device)
    alive = torch.arange(shape[0], device=device)  # rows still growing; only they are computed
    logits = _head(model)
    with DecodeLayout(prefixes, num_responses, max_new_tokens) as layout:
        for step in range(max_new_tokens):
            layout.grow()
            hidden_A1H = last_hidden(model, last_R[:, None], positions_R[alive, None] + step, layout)
            logits_AV = logits(hidden_A1H[:, 0])
            if not logits_AV.amax(-1).isfinite().all():
                raise UserError(f"generate: the logits of response token {step} are not finite; expected sound weights")
            last_R = _sample(logits_AV, temperature, top_p, generator)
            tokens_RT[alive, step] = last_R
            mask_RT[alive, step] = True
            log_probs_RT[alive, step] = logits_AV.log_softmax(-1).gather(1, last_R[:, None])[:, 0]
            goes_on = ~torch.isin(last_R, ends_E)
            if not goes_on.all():
                layout.keep(goes_on)
                alive, last_R = alive[goes_on], last_R[goes_on]
            if not len(alive):
                break
    length = int(mask_RT.any(0).sum())
    parts = zip(*(x[:, :length].split(num_responses) for x in (tokens_RT, mask_RT, log_probs_RT)), strict=True)
    groups = [Responses(*part) for part in parts]
    return groups[0] if isinstance(prefix, PrefixCache) else groups


def _head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Hidden states [R, H] -> float32 logits [R, V], with the final soft cap of models that have one."""
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


def _check_arguments(num_responses, max_new_tokens, temperature, top_p, ends, prefixes) -> None:
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
