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
    log_p = (z_n - stats["top"]) - stats["log_sum"]
    if kind == "log_prob":
        return log_p, Factors(zeros, -ones, ones)
    advantage = stats["lse_difference"] - stats["gap"]
    if kind == "policy with kl baseline":
        advantage = advantage + stats["kl"]
    stats["advantage"] = advantage
    return -advantage * log_p, Factors(zeros, advantage, -advantage)


def jensen_shannon(beta: float, log_p: Tensor, log_q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Terms d with sum_v d = the divergence of beta, and f with gradient f - p sum_v f, from x = log q - log p too.

    beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q; beta 0 is the forward KL(q || p). p may
    underflow where q does not, so nothing is taken times p that is not of its size.
    """
    p, q = log_p.exp(), log_q.exp()
    near = x.clamp(max=1.0)
    if beta == 0:
        # sum (q - p) = 0, and with it no term cancels another; q - p from the larger part of it.
        difference = torch.where(x > 1, q - p, p * torch.expm1(near))
        return torch.where(q > 0, q * x, 0.0) - difference, -q
    # log m - log p and log m - log q, from the larger of p and q
    over_p = torch.where(x > 1, x + torch.log(beta + (1 - beta) * torch.exp(-x)), torch.log1p(beta * torch.expm1(near)))
    over_q = torch.where(x > 1, torch.log(beta + (1 - beta) * torch.exp(-x)), over_p - near)
    from_p, from_q = torch.where(p > 0, -p * over_p, 0.0), torch.where(q > 0, -q * over_q, 0.0)
    return (1 - beta) * from_p + beta * from_q, (1 - beta) * from_p
