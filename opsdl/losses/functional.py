"""The public losses: check the arguments, choose the backend, flatten, run, shape the result.

    loss = opsdl.fused_reverse_kl(student_hidden, head, teacher_hidden, mask=mask)      # live self-teacher: one head
    loss.backward()                                                                     # dHidden and dHead

Backends: "reference" is the formula on materialised logits (any dtype, for reading and testing); "torch" works in
blocks of tokens and never holds the logits of more than one block. "auto" takes "torch".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opsdl.losses import reference, terms
from opsdl.losses.arguments import Head, check_head, check_pair, check_scalars, check_tokens, token_scale
from opsdl.losses.chunked import Block, ChunkedLoss, Student
from opsdl.losses.shards import Shards

BACKENDS = {"reference": "available", "torch": "available"}


def available_backends() -> dict[str, str]:
    """Name of each loss backend -> "available", or why it is not."""
    return dict(BACKENDS)


def fused_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    skip_tolerance: float | str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Token-level KL(student || teacher) from hidden states, logits never materialised; the teacher is detached.

    student_hidden [..., Hs], student_weight [V, Hs]; teacher_hidden [..., Ht], teacher_weight [V, Ht], or None when
    the teacher uses the student's head (and its bias): a live self-teacher. Biases [V]. mask [...] bool, False drops
    the token. token_weights [...] multiply the tokens' losses. Logits are softcap * tanh(logits / softcap) / temperature
    for both; the loss carries no temperature^2 factor.

    reduction "mean" divides by the number of unmasked tokens (a mask of all False gives 0 with zero gradient),
    "sum" adds, "none" returns [...]. return_stats also returns per-token kl, student_lse, teacher_lse, entropy (of the
    student), each [...], float32 (float64 for float64), without gradient, 0 for masked tokens.

    skip_tolerance leaves out of the backward products the tokens that matter least, as long as the gradient for the
    logits keeps that relative (Frobenius) accuracy; "auto" is eps / 4 of student_hidden's dtype, None exact. The stats
    gain `skipped` [...] bool. vocab_group: weights and biases hold this rank's consecutive rows of a head sharded over
    the group in rank order; hidden states, mask and token_weights are the same on every rank. "reference" is always
    exact and takes no group.

    Source: arXiv 2604.17535; design, "Losses". Raises ValueError naming the argument, its shape and what was expected.
    """
    shared = teacher_weight is None
    if shared and teacher_bias is not None:
        raise ValueError("teacher_bias: given without teacher_weight; expected both or neither")
    check_head("student", student_hidden, student_weight, student_bias)
    check_scalars(temperature, softcap, reduction)
    student = Head(student_weight, student_bias, temperature, softcap)
    teacher = student if shared else Head(teacher_weight, teacher_bias, temperature, softcap)
    check_head("teacher", teacher_hidden, teacher.weight, teacher.bias)
    check_pair(student_hidden, student_weight, teacher_hidden, teacher.weight)
    shards = Shards.of(student_weight.shape[0], vocab_group, student_hidden.device)
    scale = token_scale(student_hidden.shape[:-1], mask, token_weights, reduction, like=student_hidden)
    if _choose(backend, vocab_group) == "reference":
        z, z_teacher = _reference_logits(student_hidden, student, teacher_hidden, teacher)
        stats = _reference_stats(z, z_teacher, scale) if return_stats else {}
        return _shape(reference.reduce(reference.reverse_kl(z, z_teacher), mask, token_weights, reduction), stats, return_stats)
    gap = _gap(student_hidden, student, teacher_hidden, teacher, shared)
    return _chunked(
        student_hidden, student, lambda block, z: terms.reverse_kl(z, gap(block, z), shards), scale, shards,
        skip_tolerance, reduction, return_stats,
    )  # fmt: skip


def fused_policy_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    tokens: Tensor,
    *,
    baseline: str | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    skip_tolerance: float | str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The paper's sampled-token form, -sg[log q(y) - log p(y)] log p(y) (arXiv 2604.17535, eq. 2 and 3).

    tokens [...] int64 are the sampled response tokens; for tokens drawn from the student its expected gradient is that
    of `fused_reverse_kl`. baseline "kl" adds KL(student || teacher) to the advantage: same mean, less variance.
    Everything else as in `fused_reverse_kl`; the stats gain `advantage`.
    """
    shared = teacher_weight is None
    if shared and teacher_bias is not None:
        raise ValueError("teacher_bias: given without teacher_weight; expected both or neither")
    if baseline not in (None, "kl"):
        raise ValueError(f"baseline: {baseline!r}; expected None or 'kl'")
    check_head("student", student_hidden, student_weight, student_bias)
    check_scalars(temperature, softcap, reduction)
    shards = Shards.of(student_weight.shape[0], vocab_group, student_hidden.device)
    check_tokens(tokens, student_hidden.shape[:-1], shards.total)
    student = Head(student_weight, student_bias, temperature, softcap)
    teacher = student if shared else Head(teacher_weight, teacher_bias, temperature, softcap)
    check_head("teacher", teacher_hidden, teacher.weight, teacher.bias)
    check_pair(student_hidden, student_weight, teacher_hidden, teacher.weight)
    scale = token_scale(student_hidden.shape[:-1], mask, token_weights, reduction, like=student_hidden)
    if _choose(backend, vocab_group) == "reference":
        z, z_teacher = _reference_logits(student_hidden, student, teacher_hidden, teacher)
        stats = _reference_stats(z, z_teacher, scale) if return_stats else {}
        values = reference.policy_reverse_kl(z, z_teacher, tokens, baseline)
        return _shape(reference.reduce(values, mask, token_weights, reduction), stats, return_stats)
    gap = _gap(student_hidden, student, teacher_hidden, teacher, shared)
    flat = tokens.flatten()
    return _chunked(
        student_hidden, student,
        lambda block, z: terms.policy_reverse_kl(z, gap(block, z), flat[block], baseline, shards),
        scale, shards, skip_tolerance, reduction, return_stats,
    )  # fmt: skip


def fused_log_prob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "none",
    skip_tolerance: float | str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """log p(token) from hidden states [..., H], head [V, H] and tokens [...]; masked tokens give 0.

    Options and errors as in `fused_reverse_kl`; `reduction` defaults to "none", since sums of it make SFT, DPO, LongPO.
    """
    check_head("student", hidden, weight, bias)
    check_scalars(temperature, softcap, reduction)
    shards = Shards.of(weight.shape[0], vocab_group, hidden.device)
    check_tokens(tokens, hidden.shape[:-1], shards.total)
    head = Head(weight, bias, temperature, softcap)
    scale = token_scale(hidden.shape[:-1], mask, token_weights, reduction, like=hidden)
    if _choose(backend, vocab_group) == "reference":
        z = reference.logits(hidden, weight, bias, temperature, softcap)
        return reference.reduce(reference.log_prob(z, tokens), mask, token_weights, reduction)
    flat = tokens.flatten()
    return _chunked(
        hidden, head, lambda block, z: terms.log_prob(z, flat[block], shards), scale, shards, skip_tolerance, reduction, False
    )


class FusedReverseKL(nn.Module):
    """`fused_reverse_kl` with its options fixed; call it with (student_hidden, student_weight, teacher_hidden, ...)."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        reduction: str = "mean",
        skip_tolerance: float | str | None = None,
        vocab_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        return_stats: bool = False,
    ):
        super().__init__()
        check_scalars(temperature, softcap, reduction)
        self.options = dict(
            temperature=temperature, softcap=softcap, reduction=reduction, skip_tolerance=skip_tolerance,
            vocab_group=vocab_group, backend=backend, return_stats=return_stats,
        )  # fmt: skip

    def forward(self, student_hidden, student_weight, teacher_hidden, teacher_weight=None, **tensors):
        return fused_reverse_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, **tensors, **self.options
        )


def _choose(backend: str, vocab_group: dist.ProcessGroup | None) -> str:
    if backend == "reference" and vocab_group is not None:
        raise ValueError("vocab_group: given with backend 'reference'; expected None there")
    if backend == "auto":
        return "torch"
    if BACKENDS.get(backend) != "available":
        raise ValueError(f"backend: {backend!r}; expected 'auto' or one of {', '.join(BACKENDS)}")
    return backend


def _gap(
    student_hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, shared: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    student_NH, teacher_NH = (x.detach().reshape(-1, x.shape[-1]) for x in (student_hidden, teacher_hidden))
    student, teacher = (_detached(head) for head in (student, teacher))
    return lambda block, z: terms.gap(z, student_NH[block], student, teacher_NH[block], teacher, shared)


def _chunked(
    hidden: Tensor,
    head: Head,
    block_loss: Callable[[Tensor, Tensor], Block],
    scale: Tensor,
    shards: Shards,
    skip_tolerance: float | str | None,
    reduction: str,
    return_stats: bool,
):
    leading = hidden.shape[:-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    stats: dict[str, Tensor] = {}
    student = Student(flat.detach(), _detached(head), block_loss, shards, _tolerance(skip_tolerance, hidden.dtype))
    with torch.autocast(hidden.device.type, enabled=False):
        out = ChunkedLoss.apply(flat, head.weight, head.bias, scale, student, reduction == "none", stats)
    if reduction == "none":
        out = out.reshape(leading)
    return _shape(out, {name: x.reshape(leading) for name, x in stats.items()}, return_stats)


def _tolerance(value: float | str | None, dtype: torch.dtype) -> float:
    if value == "auto":
        return torch.finfo(dtype).eps / 4
    if value is None:
        return 0.0
    if isinstance(value, str) or not 0 <= value < 1:
        raise ValueError(f"skip_tolerance: {value!r}; expected None, 'auto' or a number in [0, 1)")
    return float(value)


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return Head(head.weight.detach(), bias, head.temperature, head.softcap)


def _reference_logits(student_hidden, student: Head, teacher_hidden, teacher: Head) -> tuple[Tensor, Tensor]:
    return tuple(
        reference.logits(hidden, head.weight, head.bias, head.temperature, head.softcap)
        for hidden, head in ((student_hidden, student), (teacher_hidden.detach(), teacher))
    )


@torch.no_grad()
def _reference_stats(z: Tensor, z_teacher: Tensor, scale: Tensor) -> dict[str, Tensor]:
    log_p = z.log_softmax(-1)
    stats = {
        "kl": reference.reverse_kl(z, z_teacher),
        "student_lse": z.logsumexp(-1),
        "teacher_lse": z_teacher.logsumexp(-1),
        "entropy": -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1),
    }
    return {name: x.masked_fill(scale.reshape(x.shape) == 0, 0.0) for name, x in stats.items()}


def _shape(loss: Tensor, stats: dict[str, Tensor], return_stats: bool):
    return (loss, stats) if return_stats else loss
