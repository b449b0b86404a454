"""The public losses.

loss = opsdl.fused_reverse_kl(student_hidden, head, teacher_hidden, mask=mask)      # live self-teacher: one head
loss.backward()                                                                     # dHidden and dHead
"""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

import opsdl.losses.operators  # noqa: F401  defines torch.ops.opsdl.reduced_loss, token_losses
from opsdl.losses.call import Call
from opsdl.losses.checked import checked_call
from opsdl.losses.formula import by_formula
from opsdl.losses.options import KLOptions, LogProbOptions, PolicyOptions
from opsdl.losses.values import Value

Stats = dict[str, Tensor]


@overload
def fused_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None = None, *,
    return_stats: Literal[False] = False, **options: Unpack[KLOptions],
) -> Tensor: ...  # fmt: skip
@overload
def fused_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None = None, *,
    return_stats: Literal[True], **options: Unpack[KLOptions],
) -> tuple[Tensor, Stats]: ...  # fmt: skip
@overload
def fused_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None = None, *,
    return_stats: bool, **options: Unpack[KLOptions],
) -> Tensor | tuple[Tensor, Stats]: ...  # fmt: skip


def fused_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    beta: float = 1.0,
    clip: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    skip_tolerance: float | str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Compute the token-level KL(student || teacher) from hidden states; no logits are kept, the teacher is detached.

    Matrix products are in the dtype of the hidden states, or of autocast, accumulated and continued in float32. Logits
    are softcap * tanh(z / softcap) / temperature for both models; no factor temperature^2 is applied. A student's logit
    of -inf has no mass, a teacher's where the student has mass gives inf; a NaN in an unmasked token gives a NaN loss.

    Args:
        student_hidden: [..., Hs] floating point, the hidden states before the head.
        student_weight: [V, Hs] floating point; a DTensor is gathered once.
        teacher_hidden: [..., Ht], of the same tokens.
        teacher_weight: [V, Ht], or None where the teacher uses the student's head and bias: a live self-teacher.
        student_bias: [V].
        teacher_bias: [V], with a teacher_weight.
        tokens: [...] int64; the statistics then have the gap at those tokens.
        mask: [...] bool; False drops the token, which may then hold anything.
        token_weights: [...] floating point, factors of the tokens' losses, without gradient.
        temperature: Positive; what both models' logits are divided by.
        softcap: Positive, or None for no soft cap.
        beta: The divergence beta KL(q || m) + (1 - beta) KL(p || m) with m = (1 - beta) p + beta q, of student p and
            teacher q: 1 is the reverse KL(p || q), 0 the forward KL(q || p). Other than 1 takes backend "torch".
        clip: Upper limit of one token's loss in nats; a clipped token has no gradient.
        vocab_size: Entries of the real vocabulary; entries of either head after them are padding, with no logits and
            zero gradient. None: all of them.
        reduction: "mean" divides by the number of unmasked tokens (0 where there are none), "sum" adds, "none" keeps
            [...].
        skip_tolerance: Tokens, and with backend "cpu" tiles of 256 entries of a token, whose gradients together are
            below this fraction (relative Frobenius norm, for the logits) are left out of the backward's products. None
            is exact; "auto" is 1/20 of the dtype's eps, which keeps the bf16 gradient of real models within 0.3 %.
            "triton" leaves out whole tokens, by an estimate of their gradients from the KL.
        vocab_group: The process group over which the vocabulary is sharded, or None. Heads and biases are this rank's
            consecutive entries, hidden states and masks the same on every rank; dHidden comes back summed over ranks.
        backend: "reference" the formula on materialised logits; "torch" blocks of tokens in torch; "cpu" the C++ of
            csrc/cpu; "triton" the kernels of kernels/; "auto" the best that is there.
        return_stats: Whether to return the statistics too, which cost no other pass.

    Returns:
        The loss in nats, a scalar or [...], float32 (float64 for float64). With return_stats also a dict of per-token
        kl, student_lse, teacher_lse, entropy (of the student), with `tokens` gap, and with a skip_tolerance skipped
        (the share of a token's gradient products that was left out), each [...], without gradient, 0 where masked.

    Raises:
        ValueError: An argument is wrong; the message names it, its shape or value, and what was expected.

    Source:
        arXiv 2604.17535; docs/design.md, "Losses".
    """
    call = checked_call(
        Value.KL, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, tokens,
        mask, token_weights, temperature, softcap, vocab_size, reduction, skip_tolerance, vocab_group, backend, beta,
        clip,
    )  # fmt: skip
    return _compute(call, student_hidden.shape[:-1], mask, token_weights, reduction, return_stats)


@overload
def fused_policy_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None,
    tokens: Tensor, *, return_stats: Literal[False] = False, **options: Unpack[PolicyOptions],
) -> Tensor: ...  # fmt: skip
@overload
def fused_policy_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None,
    tokens: Tensor, *, return_stats: Literal[True], **options: Unpack[PolicyOptions],
) -> tuple[Tensor, Stats]: ...  # fmt: skip
@overload
def fused_policy_reverse_kl(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None,
    tokens: Tensor, *, return_stats: bool, **options: Unpack[PolicyOptions],
) -> Tensor | tuple[Tensor, Stats]: ...  # fmt: skip


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
    vocab_size: int | None = None,
    reduction: str = "mean",
    skip_tolerance: float | str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Compute the paper's sampled-token loss -A log p(token), A = log q(token) - log p(token) held constant.

    Where the tokens were drawn from p, the expected gradient of the sum equals that of `fused_reverse_kl`.

    Args:
        student_hidden: As in `fused_reverse_kl`, like all that is not described here.
        student_weight: [V, Hs].
        teacher_hidden: [..., Ht].
        teacher_weight: [V, Ht], or None for the student's head.
        tokens: [...] int64, the sampled tokens.
        baseline: "kl" adds KL(student || teacher) to A: the same mean, less variance. None adds nothing.
        student_bias: [V].
        teacher_bias: [V].
        mask: [...] bool.
        token_weights: [...] floating point.
        temperature: Positive.
        softcap: Positive, or None.
        vocab_size: Entries of the real vocabulary, or None for all.
        reduction: "mean", "sum" or "none".
        skip_tolerance: None, "auto" or a fraction.
        vocab_group: The process group over which the vocabulary is sharded, or None.
        backend: "auto", "reference", "torch", "cpu" or "triton".
        return_stats: Whether to return the statistics too.

    Returns:
        The loss in nats^2, a scalar or [...]; with return_stats also the statistics of `fused_reverse_kl` with
        tokens, and advantage.

    Raises:
        ValueError: An argument is wrong; the message names it, its shape or value, and what was expected.

    Source:
        arXiv 2604.17535, eq. 2 and 3; docs/design.md, "Losses".
    """
    value = Value.POLICY if baseline is None else Value.POLICY_WITH_BASELINE
    call = checked_call(
        value, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, tokens,
        mask, token_weights, temperature, softcap, vocab_size, reduction, skip_tolerance, vocab_group, backend,
        baseline=baseline,
    )  # fmt: skip
    return _compute(call, student_hidden.shape[:-1], mask, token_weights, reduction, return_stats)


@overload
def fused_log_prob(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, return_stats: Literal[False] = False,
    **options: Unpack[LogProbOptions],
) -> Tensor: ...  # fmt: skip
@overload
def fused_log_prob(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, return_stats: Literal[True], **options: Unpack[LogProbOptions]
) -> tuple[Tensor, Stats]: ...
@overload
def fused_log_prob(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, return_stats: bool, **options: Unpack[LogProbOptions]
) -> Tensor | tuple[Tensor, Stats]: ...


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
    vocab_size: int | None = None,
    reduction: str = "none",
    skip_tolerance: float | str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Compute log p(token) from hidden states: the piece that SFT, DPO and LongPO are made of.

    Args:
        hidden: [..., H] floating point, the hidden states before the head.
        weight: [V, H] floating point, the head.
        tokens: [...] int64.
        bias: [V], and the options below as in `fused_reverse_kl`.
        mask: [...] bool; a masked token has log probability 0.
        token_weights: [...] floating point.
        temperature: Positive.
        softcap: Positive, or None.
        vocab_size: Entries of the real vocabulary, or None for all.
        reduction: "mean", "sum" or, unlike the other losses' default, "none".
        skip_tolerance: None, "auto" or a fraction.
        vocab_group: The process group over which the vocabulary is sharded, or None.
        backend: "auto", "reference", "torch", "cpu" or "triton".
        return_stats: Whether to return the statistics too.

    Returns:
        [...] log probabilities in nats, or a scalar; with return_stats also a dict of student_lse and entropy, [...]
        each.

    Raises:
        ValueError: An argument is wrong; the message names it, its shape or value, and what was expected.
    """
    call = checked_call(
        Value.LOG_PROB, hidden, weight, bias, None, None, None, tokens, mask, token_weights, temperature, softcap,
        vocab_size, reduction, skip_tolerance, vocab_group, backend,
    )  # fmt: skip
    return _compute(call, hidden.shape[:-1], mask, token_weights, reduction, return_stats)


def _compute(
    call: Call, leading: torch.Size, mask: Tensor | None, token_weights: Tensor | None, reduction: str,
    return_stats: bool,
) -> Tensor | tuple[Tensor, Stats]:  # fmt: skip
    """Return the loss, and the statistics where they are asked for; the tokens have the leading shape."""
    if call.backend == "reference":
        loss, stats = by_formula(call, leading, mask, token_weights, reduction)
        return (loss, stats) if return_stats else loss
    if reduction == "none":
        loss_N, stats_SN = torch.ops.opsdl.token_losses(*call.flat())
        loss = loss_N.reshape(leading)
    else:
        loss, stats_SN, *_ = torch.ops.opsdl.reduced_loss(*call.flat())
    if not return_stats:
        return loss
    return loss, {name: x.reshape(leading) for name, x in zip(call.statistics, stats_SN.detach(), strict=True)}
