"""Partial attention states and their merge: the arithmetic under a shared prefix.

A query that attends to two disjoint sets of keys can attend to each alone and merge the two (out, lse) states:

    lse = logaddexp(lse_1, lse_2),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

Backward: the gradient of either part is the ordinary flash backward of that part, given the MERGED out and lse
(P = exp(S - lse) are then the probabilities of the whole, and rowsum(dO * O) its correction). Autograd through two
flash calls and a merge would be wrong: the lse output of a flash call carries no gradient.

On CPU the parts are torch's flash operator; elsewhere they are written out with matrix products. Both accumulate in
float32 at least: callers upcast, because the CPU operator sums dK and dV in the dtype it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention over one set of keys. Returns out [B, Hq, Lq, D] and natural-log lse [B, Hq, Lq] (fp32, fp64 for fp64).

    `causal` needs Lq == Lk. Raises ValueError on shapes the operator would crash on.
    """
    _check(query_BHLD, key_BHLD, value_BHLD, causal)
    heads, length = query_BHLD.shape[1:3]
    group = heads // key_BHLD.shape[1]
    if group > 1 and not causal:
        # The query heads of a group become more queries of one head, so that its keys are read once: 4 times faster
        # for one query over 1000 keys in bf16, 1.4 times for four.
        folded = query_BHLD.unflatten(1, (-1, group)).flatten(2, 3)
        out, lse = attend(folded, key_BHLD, value_BHLD, scale, causal)
        return out.reshape(query_BHLD.shape), lse.reshape(-1, heads, length)
    if query_BHLD.device.type == "cpu":
        return _flash(query_BHLD, key_BHLD, value_BHLD, 0.0, causal, scale=scale)
    scores = _scores(query_BHLD, key_BHLD, scale, causal)
    lse_BHL = scores.logsumexp(-1)
    probabilities = (scores - lse_BHL[..., None]).exp()
    return _values(probabilities, value_BHLD).to(query_BHLD.dtype), lse_BHL


def attend_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one part, from the merged `out` and `lse` of all parts. Shapes as in `attend`."""
    if query.device.type == "cpu":
        return _flash_backward(grad_out, query, key, value, out, lse, 0.0, causal, scale=scale)
    probabilities = (_scores(query, key, scale, causal) - lse[..., None]).exp()
    group = query.shape[1] // key.shape[1]
    value_full = value.repeat_interleave(group, 1).to(probabilities.dtype)
    grad_out = grad_out.to(probabilities.dtype)
    correction = (grad_out * out).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_out @ value_full.mT - correction) * scale
    grad_query = grad_scores @ key.repeat_interleave(group, 1).to(probabilities.dtype)
    grad_key = (grad_scores.mT @ query.to(probabilities.dtype)).unflatten(1, (-1, group)).sum(2)
    grad_value = (probabilities.mT @ grad_out).unflatten(1, (-1, group)).sum(2)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def merge(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial states over disjoint keys; arithmetic in the dtype of the lse."""
    lse = torch.logaddexp(lse_1, lse_2)
    weight_1, weight_2 = (lse_1 - lse).exp()[..., None], (lse_2 - lse).exp()[..., None]
    return (weight_1 * out_1 + weight_2 * out_2), lse


def _check(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
    ok = (
        min(query.numel(), key.numel()) > 0
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


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = query.to(dtype) @ key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    if causal:
        hidden_from = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden_from, -torch.inf)
    return scores


def _values(probabilities: Tensor, value: Tensor) -> Tensor:
    group = probabilities.shape[1] // value.shape[1]
    return probabilities @ value.to(probabilities.dtype).repeat_interleave(group, 1)
