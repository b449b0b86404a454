"""Partial attention states and their merge: the arithmetic under a shared prefix.

A query that attends to two disjoint sets of keys can attend to each alone and merge the two (out, lse) states:

    lse = logaddexp(lse_1, lse_2),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

Backward: the gradient of either part is the ordinary flash backward of that part, given the MERGED out and lse
(P = exp(S - lse) are then the probabilities of the whole, and rowsum(dO * O) its correction). Autograd through two
flash calls and a merge would be wrong: the lse output of a flash call carries no gradient.

On a CPU the parts are the operators of csrc/cpu/prefix/attention*.cpp, on a GPU those of flash.py; where those are
missing or do not take the operands, torch's CPU flash operator or the formulas. All accumulate and return float32 at
least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl import extension
from opsdl.prefix.attention.operators import fallback

KeyValue = tuple[Tensor, Tensor]  # keys and values [B, Hkv, L, D] of the same tokens in one layer

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend over one set of keys, whole or causally.

    Args:
        query_BHLD: [B, Hq, Lq, D], any float dtype.
        key_BHLD: [B, Hkv, Lk, D], Hq a multiple of Hkv.
        value_BHLD: As the keys.
        scale: The factor of the scores.
        causal: Whether query i sees keys up to i only; then Lq == Lk.

    Returns:
        out [B, Hq, Lq, D] and natural-log lse [B, Hq, Lq], float32 (float64 for float64).

    Raises:
        ValueError: Shapes or dtypes that no operator takes.
    """
    check(query_BHLD, key_BHLD, value_BHLD, causal)
    inputs = query_BHLD, key_BHLD, value_BHLD
    if dtype := _native_dtype(query_BHLD):
        return torch.ops.opsdl.attend(*(x.to(dtype) for x in inputs), scale, causal)
    return attend_in_torch(*inputs, scale, causal)


def attend_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
    key_value: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Differentiate one part, given the merged `out` and `lse` of all parts.

    Args:
        grad_out: The gradient for the merged out, [B, Hq, Lq, D].
        query: [B, Hq, Lq, D], as given to `attend`.
        key: [B, Hkv, Lk, D], as given to `attend`.
        value: [B, Hkv, Lk, D], as given to `attend`.
        out: Merged over all parts; it may be rounded to the operands' dtype.
        lse: Merged over all parts; inf for a query that is to have no part in this.
        scale: The factor of the scores, as given to `attend`.
        causal: As given to `attend`.
        key_value: Whether dK and dV are wanted; they are empty tensors otherwise.

    Returns:
        dQ, dK, dV of this part, float32 (float64 for float64).
    """
    if dtype := _native_dtype(query):
        inputs = (grad_out, *(x.to(dtype) for x in (query, key, value)), out, lse)
        return torch.ops.opsdl.attend_backward(*inputs, scale, causal, key_value)
    return attend_backward_in_torch(grad_out, query, key, value, out, lse, scale, causal, key_value)


def merge(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial states over disjoint keys; arithmetic in the dtype of the lse.

    A state without keys has lse -inf and a finite out; merged with another such, out is 0 and lse -inf.
    """
    lse = torch.logaddexp(lse_1, lse_2)
    whole = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_1, weight_2 = (lse_1 - whole).exp()[..., None], (lse_2 - whole).exp()[..., None]
    return weight_1 * out_1 + weight_2 * out_2, lse


def check(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
    """Raise ValueError on what an operator might crash on."""
    ok = (
        query.ndim == key.ndim == 4
        and min(query.numel(), key.numel()) > 0
        and key.shape == value.shape
        and query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and (not causal or query.shape[2] == key.shape[2])
    )
    if not ok:
        raise ValueError(
            f"attention: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
            f"{', causal' if causal else ''}; expected non-empty [B, Hq, Lq, D] and [B, Hkv, Lk, D] with Hq a multiple"
            " of Hkv, and Lq == Lk if causal"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(f"attention: query {query.dtype}, key {key.dtype}, value {value.dtype}; expected one float")


def _native_dtype(query: Tensor) -> torch.dtype | None:
    """The dtype in which the compiled operators take this query, or None if they do not."""
    if query.dtype == torch.float64:
        return None
    if query.device.type != "cpu":
        return query.dtype
    if query.shape[3] % 2 or query.shape[3] > 256 or extension.load() != "available":
        return None
    return torch.bfloat16 if query.dtype == torch.bfloat16 and torch.ops.opsdl.cpu_has_bf16() else torch.float32


@fallback("attend")
def attend_in_torch(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """`attend` by torch's CPU flash operator, which is given float32 at least; elsewhere by the formulas."""
    check(query, key, value, causal)  # the flash operator ends the process where a size is 0
    query, key, value = (x.to(_wide(query)) for x in (query, key, value))
    heads, length = query.shape[1:3]
    group = heads // key.shape[1]
    if group > 1 and not causal:
        # The query heads of a group become more queries of one head, so that its keys are read once.
        folded = query.unflatten(1, (-1, group)).flatten(2, 3)
        out, lse = attend_in_torch(folded, key, value, scale, causal)
        return out.reshape(query.shape), lse.reshape(-1, heads, length)
    if query.device.type == "cpu":
        return _flash(query, key, value, 0.0, causal, scale=scale)
    scores = _scores(query, key, scale, causal)
    lse_BHL = scores.logsumexp(-1)
    return (scores - lse_BHL[..., None]).exp() @ value.repeat_interleave(group, 1), lse_BHL


@fallback("attend_backward")
def attend_backward_in_torch(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
    key_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check(query, key, value, causal)
    grad_out, query, key, value, out = (x.to(_wide(query)) for x in (grad_out, query, key, value, out))
    nothing = grad_out.new_empty(0)
    if query.device.type == "cpu":
        # The CPU operator sums dK and dV in the dtype it is given, and always computes both.
        grads = _flash_backward(grad_out, query, key, value, out, lse, 0.0, causal, scale=scale)
        return grads if key_value else (grads[0], nothing, nothing)
    probabilities = (_scores(query, key, scale, causal) - lse[..., None]).exp()
    group = query.shape[1] // key.shape[1]
    correction = (grad_out * out).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_out @ value.repeat_interleave(group, 1).mT - correction) * scale
    grad_query = grad_scores @ key.repeat_interleave(group, 1)
    if not key_value:
        return grad_query, nothing, nothing
    grad_key = (grad_scores.mT @ query).unflatten(1, (-1, group)).sum(2)
    grad_value = (probabilities.mT @ grad_out).unflatten(1, (-1, group)).sum(2)
    return grad_query, grad_key, grad_value


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    if causal:
        hidden_from = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden_from, -torch.inf)
    return scores
