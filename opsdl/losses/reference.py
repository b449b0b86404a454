"""The loss formulas, written out: materialise the logits, let autograd differentiate. For reading and for tests.

They work in any floating dtype; in float64 they are the truth the other backends are measured against. Notation
(docs/design.md, "Glossary"): z student logits, gap = student minus teacher logit, lse natural-log logsumexp, p student
probabilities.

    KL(p || q) = sum_v p_v (log p_v - log q_v)                    d KL / d z_v = p_v (gap_v - mean gap)
    policy     = - sg[log q(y) - log p(y)] log p(y)               (arXiv 2604.17535, eq. 2 and 3)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    """Compute softcap * tanh((hidden weight^T + bias) / softcap) / temperature.

    Args:
        hidden: [..., H] hidden states, before the head.
        weight: [V, H], the head.
        bias: [V], or None.
        temperature: What the logits are divided by.
        softcap: The bound of the logits before the temperature, or None. A logit of -inf, padding, stays one.

    Returns:
        [..., V] logits.
    """
    z = hidden @ weight.mT
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = torch.where(z > -torch.inf, softcap * torch.tanh(z / softcap), z)  # padding stays padding
    return z / temperature


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the token-level KL(student || teacher); the teacher is detached.

    Args:
        student_logits: [..., V]; an entry of -inf contributes nothing.
        teacher_logits: [..., V].

    Returns:
        [...] nats.

    Source:
        arXiv 2604.17535; docs/design.md, "Losses".
    """
    log_p = student_logits.log_softmax(-1)
    log_q = teacher_logits.detach().log_softmax(-1)
    gap = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
    return (log_p.exp() * gap).sum(-1)


def divergence(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Compute beta KL(q || m) + (1 - beta) KL(p || m) with m = (1 - beta) p + beta q, of student p and teacher q.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], detached.
        beta: 1 is the reverse KL(p || q), 0 the forward KL(q || p).

    Returns:
        [...] nats.
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
    """Compute the sampled-token form - A log p(token), A = log q(token) - log p(token) held constant.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], detached.
        tokens: [...] int64, the sampled tokens.
        baseline: "kl" adds the KL to A, with the same mean; None adds nothing.

    Returns:
        [...] nats^2.

    Source:
        arXiv 2604.17535, eq. 2 and 3.
    """
    log_p = student_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    log_q = teacher_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    advantage = log_q - log_p
    if baseline == "kl":
        advantage = advantage + reverse_kl(student_logits, teacher_logits)
    return -advantage.detach() * log_p


def log_prob(student_logits: Tensor, tokens: Tensor) -> Tensor:
    """Compute log p(token).

    Args:
        student_logits: [..., V].
        tokens: [...] int64.

    Returns:
        [...] nats.
    """
    return student_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@torch.no_grad()
def statistics(z: Tensor, z_teacher: Tensor | None, tokens: Tensor | None) -> dict[str, Tensor]:
    """Compute the statistics of each token that the losses report.

    Args:
        z: [..., V], the student's logits.
        z_teacher: [..., V], the teacher's; None leaves out what needs them.
        tokens: [...] int64, where the gap is taken; None leaves it out.

    Returns:
        kl, student_lse, teacher_lse, entropy (of the student) and gap, [...] nats each.
    """
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
    """Reduce the tokens' values to a loss; a mask without any True token gives 0.

    Args:
        per_token: [...].
        mask: [...] bool, False for tokens that do not count; None: all count.
        token_weights: [...], factors of the values, or None.
        reduction: "mean" over the unmasked tokens, "sum", or "none" for the weighted values themselves.

    Returns:
        A scalar, or [...].
    """
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
