"""From the moments of the whole vocabulary to each loss: its value, its statistics, and its gradient in three factors.

The gradient of every loss for the logits z of one token has one form, with p the student's probabilities:

    on_gap p (gap - mean gap)  +  on_prob p  +  on_token [v = token]

    KL          p (gap - mean gap)
    LOG_PROB    [v = token] - p
    POLICY      A (p - [v = token]),  A = log q(token) - log p(token) [+ KL], held constant (arXiv 2604.17535, eq. 2, 3)
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Value(StrEnum):
    """Which number a loss computes for each token."""

    KL = "kl"  # the divergence of the student from the teacher
    POLICY = "policy"  # - A log p(token)
    POLICY_WITH_BASELINE = "policy_with_baseline"  # the same, with the KL added to A
    LOG_PROB = "log_prob"  # log p(token); no teacher

    @property
    def is_policy(self) -> bool:
        return self in (Value.POLICY, Value.POLICY_WITH_BASELINE)


class Factors(NamedTuple):
    """The three factors of each token's gradient, [n] each."""

    on_gap: Tensor
    on_prob: Tensor
    on_token: Tensor

    def scaled(self, scale_n: Tensor) -> Factors:
        return Factors(*(x * scale_n for x in self))


def statistic_names(value: Value, with_tokens: bool, skipping: bool) -> tuple[str, ...]:
    """The statistics that a loss reports, in order."""
    skipped = ("skipped",) if skipping else ()
    if value is Value.LOG_PROB:
        return ("student_lse", "entropy", *skipped)
    gap = ("gap",) if with_tokens else ()
    advantage = ("advantage",) if value.is_policy else ()
    return ("kl", "student_lse", "teacher_lse", "entropy", *gap, *advantage, *skipped)


def finish(
    value: Value, clip: float | None, stats: dict[str, Tensor], picked_3n: Tensor, divergence_n: Tensor | None
) -> tuple[Tensor, Factors]:
    """Compute the value and the gradient factors of each token; `gap` and `advantage` join the statistics.

    Args:
        value: What is computed.
        clip: Upper limit of a token's divergence, in nats.
        stats: What `moments.statistics` found, [n] each.
        picked_3n: Logit, gap and slope at the sampled tokens.
        divergence_n: Another divergence of the Jensen-Shannon family that takes the place of the reverse KL.
    """
    z_n, stats["gap"], _ = picked_3n
    zeros, ones = torch.zeros_like(z_n), torch.ones_like(z_n)
    if value is Value.KL:
        value_n = stats["kl"] if divergence_n is None else divergence_n
        if clip is None:
            return value_n, Factors(ones, zeros, zeros)
        return value_n.clamp(max=clip), Factors((value_n <= clip).to(ones.dtype), zeros, zeros)
    log_p = (z_n - stats["top"]) - stats["log_sum"]
    if value is Value.LOG_PROB:
        return log_p, Factors(zeros, -ones, ones)
    advantage = stats["lse_difference"] - stats["gap"]
    if value is Value.POLICY_WITH_BASELINE:
        advantage = advantage + stats["kl"]
    stats["advantage"] = advantage
    return -advantage * log_p, Factors(zeros, advantage, -advantage)


def jensen_shannon(beta: float, log_p: Tensor, log_q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute terms d with sum_v d = the divergence of beta, and f with gradient f - p sum_v f; x is log q - log p.

    The divergence is beta KL(q || m) + (1 - beta) KL(p || m) with m = (1 - beta) p + beta q; beta 0 is the forward
    KL(q || p). p may underflow where q does not, so nothing is taken times p that is not of its size.
    """
    p, q = log_p.exp(), log_q.exp()
    bounded = x.clamp(max=1.0)
    if beta == 0:
        # sum (q - p) = 0, and with it no term cancels another; q - p from the larger part of it.
        difference = torch.where(x > 1, q - p, p * torch.expm1(bounded))
        return torch.where(q > 0, q * x, 0.0) - difference, -q
    # log m - log p and log m - log q, from the larger of p and q
    large = torch.log(beta + (1 - beta) * torch.exp(-x))
    over_p = torch.where(x > 1, x + large, torch.log1p(beta * torch.expm1(bounded)))
    over_q = torch.where(x > 1, large, over_p - bounded)
    from_p, from_q = torch.where(p > 0, -p * over_p, 0.0), torch.where(q > 0, -q * over_q, 0.0)
    return (1 - beta) * from_p + beta * from_q, (1 - beta) * from_p
