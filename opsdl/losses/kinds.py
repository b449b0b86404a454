"""From the moments of the whole vocabulary to each loss: its value, its statistics, and its gradient in three factors.

The gradient of every loss for the logits z of one token has one form, with p the student's probabilities:

    on_gap p (gap - mean gap)  +  on_prob p  +  on_token [v = token]

    KL          p (gap - mean gap)
    log_prob    [v = token] - p
    policy      A (p - [v = token]),  A = log q(token) - log p(token) [+ KL], held constant (arXiv 2604.17535, eq. 2, 3)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KL_STATISTICS = ("kl", "student_lse", "teacher_lse", "entropy")


class Factors(NamedTuple):
    """Of each token, [n]."""

    on_gap: Tensor
    on_prob: Tensor
    on_token: Tensor

    def scaled(self, scale_n: Tensor) -> Factors:
        return Factors(*(x * scale_n for x in self))


def names(kind: str, with_tokens: bool, skipping: bool) -> tuple[str, ...]:
    """The statistics that a loss reports, in order."""
    if kind == "log_prob":
        out = ("student_lse", "entropy")
    else:
        out = (*KL_STATISTICS, *(("gap",) if with_tokens else ()), *(("advantage",) if kind != "kl" else ()))
    return (*out, "skipped") if skipping else out


def finish(
    kind: str, clip: float | None, stats: dict[str, Tensor], picked_3n: Tensor, divergence_n: Tensor | None
) -> tuple[Tensor, Factors]:
    """Value and gradient factors of each token; adds `gap` and `advantage` to the statistics where they exist."""
    z_n, stats["gap"], _ = picked_3n
    zeros, ones = torch.zeros_like(z_n), torch.ones_like(z_n)
    if kind == "kl":
        value_n = stats["kl"] if divergence_n is None else divergence_n
        if clip is None:
            return value_n, Factors(ones, zeros, zeros)
        return value_n.clamp(max=clip), Factors((value_n <= clip).to(ones.dtype), zeros, zeros)
    log_p = z_n - stats["student_lse"]
    if kind == "log_prob":
        return log_p, Factors(zeros, -ones, ones)
    advantage = stats["student_lse"] - stats["teacher_lse"] - stats["gap"]
    if kind == "policy with kl baseline":
        advantage = advantage + stats["kl"]
    stats["advantage"] = advantage
    return -advantage * log_p, Factors(zeros, advantage, -advantage)


def jensen_shannon(beta: float, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Terms d with sum_v p d = the divergence of beta, and f with gradient p (f - sum_v p f), from log p - log q.

    beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q; beta 0 is the forward KL(q || p). The terms of d
    that are linear in the ratio add to zero over the vocabulary, and are left out.
    """
    x = -log_ratio.clamp(min=-80.0)  # log q - log p
    growth = torch.expm1(x)
    if beta == 0:
        return x * (growth + 1) - growth, -(growth + 1)
    to_mixture = -torch.log1p(beta * growth)  # log p - log m
    return (1 - beta) * to_mixture + beta * (growth + 1) * (to_mixture + x), (1 - beta) * to_mixture
