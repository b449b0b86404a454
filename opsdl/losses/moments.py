"""The loss math that all backends share: what one pass over the vocabulary must bring home, and what follows from it.

A backend cuts the vocabulary into parts and reports seven numbers of each part and token, taken over the part's entries
v with e_v = exp(z_v - max), z the student's logits and gap = student minus teacher logit; where z is -inf, gap is minus
the teacher's logit, and counts for the teacher only:

    MAX            max z                       -inf where the part holds nothing but padding
    SUM            sum e
    OFFSET         sum e (z - MAX) / SUM       for the entropy
    GAP            sum e gap / SUM
    SPREAD         sum e rho(GAP - gap) / SUM  rho(x) = exp(x) - 1 - x >= 0
    TEACHER_MAX    max (z - gap)
    TEACHER_SUM    sum exp(z - gap - TEACHER_MAX)

Parts merge into one of the same form, on one device or over a process group, and the KL is log1p(SPREAD) of the whole:
with c = gap - sum_v p gap, KL = log sum_v p exp(-c) = log1p(sum_v p rho(-c)) (docs/design.md, "Losses"). Nothing
cancels: every term is >= 0 and small where c is, so KL keeps its relative accuracy at 1e-7 and below, where
sum_v p gap - lse_s + lse_t has no digits left.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX, SUM, OFFSET, GAP, SPREAD, TEACHER_MAX, TEACHER_SUM = range(7)


def expm1_residual(x: Tensor) -> Tensor:
    """Return rho(x) = exp(x) - 1 - x >= 0 with full relative accuracy."""
    # Below 0.5 expm1(x) - x loses digits; there the Taylor series, as nested products, converges fast.
    series = torch.ones_like(x)
    for n in range(18 if x.dtype == torch.float64 else 10, 2, -1):
        series = 1 + x / n * series
    return torch.where(x.abs() < 0.5, x * x / 2 * series, torch.expm1(x) - x)


def measure(z_nV: Tensor, gap_nV: Tensor) -> Tensor:
    """Return the moments [7, n] of one part, from its logits: what every kernel computes, written in torch."""
    present = z_nV > -torch.inf
    teacher_nV = torch.where(present, z_nV, 0.0) - gap_nV
    gap_nV = torch.where(present, gap_nV, 0.0)
    max_n1 = z_nV.amax(-1, keepdim=True)
    below_nV = torch.where(present, z_nV - max_n1, 0.0)
    e_nV = torch.where(present, below_nV.exp(), 0.0)
    sum_n = e_nV.sum(-1)
    share_nV = e_nV / sum_n.clamp(min=1)[:, None]  # a part with any entry has SUM >= 1
    gap_n = (share_nV * gap_nV).sum(-1)
    spread_n = (share_nV * expm1_residual((gap_n[:, None] - gap_nV).clamp(max=80.0))).sum(-1)
    teacher_max_n1 = teacher_nV.amax(-1, keepdim=True)
    teacher_sum_n = torch.where(teacher_nV > -torch.inf, (teacher_nV - teacher_max_n1).exp(), 0.0).sum(-1)
    offset_n = (share_nV * below_nV).sum(-1)
    return torch.stack([max_n1[:, 0], sum_n, offset_n, gap_n, spread_n, teacher_max_n1[:, 0], teacher_sum_n])


def merge(parts_7kn: Tensor) -> Tensor:
    """Return the moments [7, n] of the union of k parts [7, k, n]."""
    tops, sums, offsets, gaps, spreads, teacher_tops, teacher_sums = parts_7kn
    top, teacher_top = tops.amax(0), teacher_tops.amax(0)
    scaled = torch.where(tops > -torch.inf, sums * (tops - top).exp(), 0.0)
    total = scaled.sum(0)
    share = scaled / total
    gap = torch.where(share > 0, share * gaps, 0.0).sum(0)
    # Means that lie 80 apart mean a KL that `statistics` takes from the logsumexps; the limit keeps inf * 0 away.
    shift = (gap - gaps).clamp(max=80.0)
    # Nor may a spread overflow where there is no share of it left.
    spread = torch.where(share > 0, share * (expm1_residual(shift) + shift.exp() * spreads), 0.0).sum(0)
    offset = (share * torch.where(share > 0, offsets + (tops - top), 0.0)).sum(0)
    teacher_total = torch.where(teacher_tops > -torch.inf, teacher_sums * (teacher_tops - teacher_top).exp(), 0.0).sum(
        0
    )
    return torch.stack([top, total, offset, gap, spread, teacher_top, teacher_total])


def statistics(moments_7n: Tensor) -> dict[str, Tensor]:
    """Return kl, student_lse, teacher_lse, entropy (of the student) and mean_gap of each token [n], in nats.

    With them comes what log probabilities are made of without rounding to the size of the logits: log p = (z - top) -
    log_sum, of the teacher (z - gap - teacher_top) - teacher_log_sum, and lse_difference, student minus teacher.
    """
    top, total, offset, gap, spread, teacher_top, teacher_total = moments_7n
    log_sum, teacher_log_sum = total.log(), teacher_total.log()
    student_lse = top + log_sum
    far_difference = (top - teacher_top) + (log_sum - teacher_log_sum)
    by_spread, by_lses = torch.log1p(spread), gap - far_difference
    # Far apart exp(-c) overflows, and what the teacher favours may have no mass left under the student: there the plain
    # logsumexp form is the accurate one, and differs from the other by more than its own rounding (at most 0.5 of this
    # measure over vocabularies up to 151936 and logits up to 1000).
    rounding = torch.finfo(gap.dtype).eps * (
        1 + sum(x.abs() for x in (gap, top, teacher_top, log_sum, teacher_log_sum))
    )
    is_close = (by_spread < 1) & ((by_lses - by_spread).abs() <= 4 * rounding)
    kl = torch.where(is_close, by_spread, by_lses.clamp(min=0))
    lse_difference = torch.where(is_close, gap - kl, far_difference)  # from KL = mean gap - lse_s + lse_t
    return {
        "top": top,
        "log_sum": log_sum,
        "teacher_top": teacher_top,
        "teacher_log_sum": teacher_log_sum,
        "lse_difference": lse_difference,
        "kl": kl,
        "student_lse": student_lse,
        "teacher_lse": student_lse - lse_difference,
        "entropy": log_sum - offset,
        "mean_gap": gap,
    }
