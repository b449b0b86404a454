"""The backend "reference": a call by the formulas of reference.py on materialised logits, left to autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.losses import reference
from opsdl.losses.arguments import check_token_values
from opsdl.losses.call import Call
from opsdl.losses.values import Value


def by_formula(
    call: Call, leading: torch.Size, mask: Tensor | None, token_weights: Tensor | None, reduction: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the reduced loss, or the tokens' in their leading shape, and the statistics in that shape."""
    masked_N = call.scale_N == 0
    tokens_N = call.tokens_N
    if tokens_N is not None:
        check_token_values(tokens_N, call.scale_N, call.vocab_size)
        tokens_N = tokens_N.where(~masked_N, 0)
    values_N, stats = _values(call, tokens_N)
    loss = reference.reduce(values_N.reshape(leading), mask, token_weights, reduction)
    return loss, {name: x.masked_fill(masked_N, 0.0).reshape(leading) for name, x in stats.items()}


def _values(call: Call, tokens_N: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the value of each token, with its graph, and the statistics, [N] each."""
    z_NV = _logits(call, call.hidden_NH, call.weight_VH, call.bias_V)
    if call.value is Value.LOG_PROB:
        assert tokens_N is not None
        return reference.log_prob(z_NV, tokens_N), reference.statistics(z_NV, None, None)
    assert call.teacher_hidden_NK is not None
    weight_VK, bias_V = call.weight_VH, call.bias_V
    if call.teacher_weight_VK is not None:
        weight_VK, bias_V = call.teacher_weight_VK, call.teacher_bias_V
    z_teacher_NV = _logits(call, call.teacher_hidden_NK, weight_VK, bias_V).detach()
    stats = reference.statistics(z_NV.detach(), z_teacher_NV, tokens_N)
    if call.value is Value.KL:
        values_N = reference.divergence(z_NV, z_teacher_NV, call.beta)
        return values_N if call.clip is None else values_N.clamp(max=call.clip), stats
    assert tokens_N is not None
    stats["advantage"] = stats["student_lse"] - stats["teacher_lse"] - stats["gap"]
    baseline = None
    if call.value is Value.POLICY_WITH_BASELINE:
        baseline, stats["advantage"] = "kl", stats["advantage"] + stats["kl"]
    return reference.policy_reverse_kl(z_NV, z_teacher_NV, tokens_N, baseline), stats


def _logits(call: Call, hidden_NK: Tensor, weight_VK: Tensor, bias_V: Tensor | None) -> Tensor:
    return reference.logits(hidden_NK, weight_VK, bias_V, call.temperature, call.softcap)[:, : call.vocab_size]
