"""The loss formulas, written out: materialise the logits, let autograd differentiate. For reading and for tests.

Works in any floating dtype; in float64 it is the truth the other backends are measured against. Notation (design,
"Glossary"): z student logits, gap = student minus teacher logit, lse natural-log logsumexp, p student probabilities.

    KL(p || q) = sum_v p_v (log p_v - log q_v)                    d KL / d z_v = p_v (gap_v - mean gap)
    policy     = - sg[log q(y) - log p(y)] log p(y)               (arXiv 2604.17535, eq. 2 and 3)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    """softcap(hidden weight^T + bias) / temperature: [..., H], [V, H] -> [..., V]."""
    z = hidden @ weight.mT
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = torch.where(z > -torch.inf, softcap * torch.tanh(z / softcap), z)  # padding stays padding
    return z / temperature


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Token-level KL(student || teacher): [..., V] x 2 -> [...]. The teacher is detached.

    A vocabulary entry whose student logit is -inf contributes nothing.
    """
    log_p = student_logits.log_softmax(-1)
    log_q = teacher_logits.detach().log_softmax(-1)
    gap = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
    return (log_p.exp() * gap).sum(-1)


def divergence(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q: [..., V] x 2 -> [...].

    beta 1 is the reverse KL(p || q), beta 0 the forward KL(q || p), of student p and teacher q.
    """
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits)
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    in_p, in_q = log_p > -torch.inf, log_q > -torch.inf
    if beta == 0:
        return (log_q.exp() * torch.where(in_q, log_q - log_p, 0.0)).sum(-1)
    some_p, some_q = (torch.where(in_p | in_q, x, 0.0) for x in (log_p, log_q))
    log_m = torch.logaddexp(some_p + math.log(1 - beta), some_q + math.log(beta))
    from_q = log_q.exp() * torch.where(in_q, log_q - log_m, 0.0)
    from_p = log_p.exp() * torch.where(in_p, log_p - log_m, 0.0)
    return (beta * from_q + (1 - beta) * from_p).sum(-1)


def policy_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, baseline: str | None = None
) -> Tensor:
    """Sampled-token form: [..., V] x 2, [...] -> [...]. baseline "kl" adds the KL to the advantage (same mean)."""
    log_p = student_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    log_q = teacher_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    advantage = log_q - log_p
    if baseline == "kl":
        advantage = advantage + reverse_kl(student_logits, teacher_logits)
    return -advantage.detach() * log_p


def log_prob(student_logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token): [..., V], [...] -> [...]."""
    return student_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@torch.no_grad()
def statistics(z: Tensor, z_teacher: Tensor | None, tokens: Tensor | None) -> dict[str, Tensor]:
    """Per-token kl, student_lse, teacher_lse, entropy and gap at the tokens; those that need no teacher without one."""
    log_p = z.log_softmax(-1)
    stats = {
        "student_lse": z.logsumexp(-1),
        "entropy": -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1),
    }
    if z_teacher is None:
        return stats
    stats = {
        "kl": reverse_kl(z, z_teacher),
        "student_lse": stats["student_lse"],
        "teacher_lse": z_teacher.logsumexp(-1),
        **stats,
    }
    if tokens is not None:
        stats["gap"] = (z - z_teacher).gather(-1, tokens[..., None])[..., 0]
    return stats


def reduce(per_token: Tensor, mask: Tensor | None, token_weights: Tensor | None, reduction: str) -> Tensor:
    """Weighted sum, mean over unmasked tokens, or per-token values; a mask without any True token gives 0."""
    if mask is not None:
        per_token = torch.where(mask, per_token, 0.0)
    if token_weights is not None:
        per_token = per_token * token_weights
    if reduction == "none":
        return per_token
    if reduction == "sum":
        return per_token.sum()
    count = per_token.numel() if mask is None else int(mask.sum())
    return per_token.sum() / max(count, 1)
