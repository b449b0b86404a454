"""The loss math of one block of tokens: from student logits and gap to KL, statistics and dlogits.

gap = student minus teacher logit, c = gap - sum_v p gap. Then, without cancellation (design, "Losses"),

    KL = log1p(sum_v p (exp(-c) - 1 + c)),        d KL / d z = p (c - sum_v p c) = p c

Every term of the sum is >= 0 and small where c is, so KL keeps its relative accuracy at 1e-7 and below, where
sum_v p gap - lse_s + lse_t has no digits left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.losses.arguments import Head
from opsdl.losses.chunked import Block, cap, logits
from opsdl.losses.shards import Shards


def expm1_residual(x: Tensor) -> Tensor:
    """exp(x) - 1 - x >= 0 with full relative accuracy."""
    # Below 0.5 expm1(x) - x loses digits; there the Taylor series, as nested products, converges fast.
    series = torch.ones_like(x)
    for n in range(18 if x.dtype == torch.float64 else 10, 2, -1):
        series = 1 + x / n * series
    return torch.where(x.abs() < 0.5, x * x / 2 * series, torch.expm1(x) - x)


def reverse_kl(z_nV: Tensor, gap_nV: Tensor, shards: Shards) -> Block:
    """KL(student || teacher) of each token; stats: kl, student_lse, teacher_lse, entropy."""
    student_lse = shards.logsumexp(z_nV)
    p_nV = (z_nV - student_lse).exp()
    # Padding at -inf has no mass under the student, so the teacher's logit there does not matter.
    present = z_nV > -torch.inf
    gap_nV = torch.where(present, gap_nV, 0.0)
    mean_gap = shards.sum((p_nV * gap_nV).sum(-1, keepdim=True))
    centred_nV = gap_nV - mean_gap
    kl = torch.log1p(shards.sum((p_nV * expm1_residual(-centred_nV)).sum(-1)))
    if not (kl < 1).all():
        # Far apart, exp(-c) may overflow: there the plain logsumexp form is the accurate one.
        far = shards.logsumexp(z_nV - student_lse - centred_nV)[:, 0]
        kl = torch.where(kl < 1, kl, far)
    entropy = student_lse[:, 0] - shards.sum((p_nV * torch.where(present, z_nV, 0.0)).sum(-1))
    # lse_t = lse_s - mean gap + KL, from KL = mean gap - lse_s + lse_t.
    stats = {
        "kl": kl,
        "student_lse": student_lse[:, 0],
        "teacher_lse": student_lse[:, 0] - mean_gap[:, 0] + kl,
        "entropy": entropy,
    }
    return kl, stats, lambda: p_nV * centred_nV


def log_prob(z_nV: Tensor, tokens_n: Tensor, shards: Shards) -> Block:
    """log p(token) of each token; stats: student_lse."""
    lse = shards.logsumexp(z_nV)
    value = shards.pick(z_nV, tokens_n) - lse[:, 0]

    def gradient() -> Tensor:
        local_n, here_n = shards.locate(tokens_n)
        grad_nV = (z_nV - lse).exp_().neg_()
        return grad_nV.scatter_add_(1, local_n[:, None], here_n[:, None].to(grad_nV.dtype))

    return value, {"student_lse": lse[:, 0]}, gradient


def policy_reverse_kl(z_nV: Tensor, gap_nV: Tensor, tokens_n: Tensor, baseline: str | None, shards: Shards) -> Block:
    """-A log p(token), A = log q(token) - log p(token) [+ KL], A held constant (arXiv 2604.17535, eq. 2 and 3)."""
    kl, stats, _ = reverse_kl(z_nV, gap_nV, shards)
    log_p, _, log_p_gradient = log_prob(z_nV, tokens_n, shards)
    advantage = stats["student_lse"] - stats["teacher_lse"] - shards.pick(gap_nV, tokens_n)
    if baseline == "kl":
        advantage = advantage + kl
    stats["advantage"] = advantage
    return -advantage * log_p, stats, lambda: log_p_gradient().mul_(-advantage[:, None])


def gap(
    z_nV: Tensor, student_hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, shared: bool
) -> Tensor:
    """Student minus teacher logit [n, V], as exact as the heads allow.

    With one head for both, (h_s - h_t) W^T has no cancellation however close the two are; under a soft cap that
    difference goes through tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b). Distinct heads: float32 logits are
    subtracted.
    """
    weight_VH = teacher.weight.to(z_nV.dtype)
    teacher_nH = teacher_hidden.to(z_nV.dtype)
    if not shared:
        return z_nV - cap(logits(teacher_nH, weight_VH, teacher.bias), teacher)[0]
    raw_gap = (student_hidden.to(z_nV.dtype) - teacher_nH) @ weight_VH.T
    if student.softcap is None:
        return raw_gap / student.temperature if student.temperature != 1 else raw_gap
    tanh_s = z_nV * (student.temperature / student.softcap)
    tanh_t = torch.tanh(logits(teacher_nH, weight_VH, teacher.bias) / student.softcap)
    return torch.tanh(raw_gap / student.softcap) * (1 - tanh_s * tanh_t) * (student.softcap / student.temperature)
