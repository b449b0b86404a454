"""The public losses: check the arguments, choose the backend, flatten, run, shape the result.

loss = opsdl.fused_reverse_kl(student_hidden, head, teacher_hidden, mask=mask)      # live self-teacher: one head
loss.backward()                                                                     # dHidden and dHead
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import opsdl.losses.operators  # noqa: F401  defines torch.ops.opsdl.reduced_loss, token_losses
from opsdl.losses import reference
from opsdl.losses.arguments import (
    check_divergence,
    check_head,
    check_pair,
    check_scalars,
    check_token_values,
    check_tokens,
    check_vocab_size,
    skip_limit,
    token_scale,
)
from opsdl.losses.backends import choose
from opsdl.losses.values import names


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
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Token-level KL(student || teacher) from hidden states, logits never materialised; the teacher is detached.

    student_hidden [..., Hs], student_weight [V, Hs]; teacher_hidden [..., Ht], teacher_weight [V, Ht], or None when the
    teacher uses the student's head (and its bias): a live self-teacher. Biases [V]. A head may be a DTensor, which is
    gathered once. mask [...] bool, False drops the token, which may then hold anything. token_weights [...] multiply
    the tokens' losses; they get no gradient. Logits are softcap * tanh(z / softcap) / temperature for both; the loss
    carries no temperature^2 factor. vocab_size: entries of the real vocabulary; rows of either head after it are
    padding, with no logits and zero gradient. A logit of -inf has no mass; a teacher at -inf where the student has mass
    gives inf.

    beta: divergence beta KL(q || m) + (1 - beta) KL(p || m) with m = (1 - beta) p + beta q, of student p and teacher q;
    1 is the reverse KL(p || q), 0 the forward KL(q || p). Other than 1 needs backend "torch". clip: upper limit of one
    token's loss, in nats; a clipped token has no gradient.

    reduction "mean" divides by the number of unmasked tokens (a mask of all False gives 0 with zero gradient), "sum"
    adds, "none" returns [...]. return_stats also returns, without another pass, per-token kl, student_lse, teacher_lse,
    entropy (of the student), with `tokens` [...] int64 the gap at those tokens, and with a skip_tolerance the skipped
    share of each token's gradient products, each [...], float32 (float64 for float64), without gradient, 0 for masked
    tokens.

    skip_tolerance: tokens, and with backend "cpu" tiles of 256 vocabulary entries of a token, whose gradients together
    are below this fraction (relative Frobenius norm, for the logits) are left out of the backward's products; None is
    exact, "auto" 1/20 of the dtype's eps, which keeps the bf16 gradient of real models within 0.3 %. "triton" skips
    whole tokens, by an estimate of their gradients from the KL.

    vocab_group: heads and biases are this rank's consecutive rows, hidden states and masks the same on every rank; the
    hidden gradient comes back summed over ranks, the head's for this rank's rows.

    backend: "reference" the formula on materialised logits; "torch" blocks of tokens in torch; "cpu" the C++ of
    csrc/cpu; "triton" the kernels of kernels/; "auto" the best that is there. Products are in the dtype of the hidden
    states, or of autocast, accumulated and continued in float32.

    Source: arXiv 2604.17535; design, "Losses". Raises ValueError naming the argument, its shape and what was expected.
    NaN in an unmasked token gives a NaN loss.
    """
    check_divergence(beta, clip)
    pair = _Pair(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    pair.check_teacher()
    options = _Options(
        mask, token_weights, temperature, softcap, vocab_size, reduction, skip_tolerance, vocab_group, backend,
        return_stats,
    )  # fmt: skip
    return _run("kl", pair, tokens, options, beta, clip)


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
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The paper's sampled-token loss: -A log p(token), A = sg[log q(token) - log p(token)] (arXiv 2604.17535, eq. 2 f).

    tokens [...] int64 are the sampled tokens; where they were drawn from p, the expected gradient of the sum equals
    that of `fused_reverse_kl`. baseline "kl" adds KL(student || teacher) to the advantage: same mean, less variance.
    Everything else as in `fused_reverse_kl`; the stats have `gap` and `advantage` too.
    """
    if baseline not in (None, "kl"):
        raise ValueError(f"baseline: {baseline!r}; expected None or 'kl'")
    pair = _Pair(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    pair.check_teacher()
    options = _Options(
        mask, token_weights, temperature, softcap, vocab_size, reduction, skip_tolerance, vocab_group, backend,
        return_stats,
    )  # fmt: skip
    return _run("policy" if baseline is None else "policy with kl baseline", pair, tokens, options)


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
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """log p(token) from hidden states: hidden [..., H], weight [V, H], tokens [...] int64 -> [...] (0 where masked).

    Options and errors as in `fused_reverse_kl`; the stats are student_lse and entropy. `reduction` defaults to "none",
    since sums of it make SFT, DPO, LongPO.
    """
    pair = _Pair(hidden, weight, bias, None, None, None)
    options = _Options(
        mask, token_weights, temperature, softcap, vocab_size, reduction, skip_tolerance, vocab_group, backend,
        return_stats,
    )  # fmt: skip
    return _run("log_prob", pair, tokens, options)


@dataclass
class _Pair:
    """Student and teacher as given, or a student alone."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None

    def check_teacher(self) -> None:
        if self.teacher_hidden is None:
            raise ValueError("teacher_hidden: None; expected floating point [..., H]")

    def check(self, vocab_size: int | None, vocab_group: dist.ProcessGroup | None) -> None:
        if self.teacher_weight is None and self.teacher_bias is not None:
            raise ValueError("teacher_bias: given without teacher_weight; expected both or neither")
        check_head("student", self.student_hidden, self.student_weight, self.student_bias)
        check_vocab_size(vocab_size, self.student_weight, "student_weight", vocab_group)
        if self.teacher_hidden is None:
            return
        weight, bias = self.teacher_head
        check_head("teacher", self.teacher_hidden, weight, bias)
        check_vocab_size(vocab_size, weight, "teacher_weight", vocab_group)
        check_pair(self.student_hidden, self.student_weight, self.teacher_hidden, weight, vocab_size)

    @property
    def teacher_head(self) -> tuple[Tensor, Tensor | None]:
        if self.teacher_weight is None:
            return self.student_weight, self.student_bias
        return self.teacher_weight, self.teacher_bias

    def gathered(self) -> _Pair:
        """With every head that is sharded as a DTensor made whole; the gradient finds its way back."""
        weights = (self.student_weight, self.student_bias, self.teacher_weight, self.teacher_bias)
        full = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in weights]
        return _Pair(self.student_hidden, full[0], full[1], self.teacher_hidden, full[2], full[3])


@dataclass(frozen=True)
class _Options:
    """The options that all three losses have."""

    mask: Tensor | None
    token_weights: Tensor | None
    temperature: float
    softcap: float | None
    vocab_size: int | None
    reduction: str
    skip_tolerance: float | str | None
    vocab_group: dist.ProcessGroup | None
    backend: str
    return_stats: bool


def _run(
    kind: str, pair: _Pair, tokens: Tensor | None, options: _Options, beta: float = 1.0, clip: float | None = None
):
    pair = pair.gathered()
    pair.check(options.vocab_size, options.vocab_group)
    check_scalars(options.temperature, options.softcap)
    if tokens is not None:
        check_tokens(tokens, pair.student_hidden)
    leading = pair.student_hidden.shape[:-1]
    dtype = _product_dtype(pair)
    device = pair.student_hidden.device
    scale_N = token_scale(pair.student_hidden, options.mask, options.token_weights, options.reduction, dtype)
    limit = skip_limit(options.skip_tolerance, dtype)
    backend = choose(options.backend, dtype, device, beta, options.vocab_group)
    if backend == "reference":
        if tokens is not None:
            check_token_values(tokens.flatten(), scale_N, options.vocab_size or len(pair.student_weight))
            tokens = tokens.where(scale_N.reshape(leading) != 0, 0)
        loss, stats = _by_formula(kind, pair, tokens, options, beta, clip)
        stats = {name: x.masked_fill(scale_N.reshape(leading) == 0, 0.0) for name, x in stats.items()}
        return (loss, stats) if options.return_stats else loss
    loss, stats_SN = _by_operator(kind, pair, tokens, options, beta, clip, scale_N, dtype, limit, backend)
    if not options.return_stats:
        return loss
    found = zip(names(kind, tokens is not None, limit > 0), stats_SN.detach().unbind(), strict=True)
    stats = {name: x.reshape(leading) for name, x in found}
    return loss, stats


def _by_operator(kind, pair: _Pair, tokens, options: _Options, beta, clip, scale_N, dtype, limit: float, backend: str):
    """(reduced loss, or per-token losses in the leading shape; stats [S, N])."""
    hidden_NH = _flat(pair.student_hidden).to(dtype)
    differentiable = hidden_NH, pair.student_weight, pair.student_bias
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in differentiable]
    detached = [
        None if x is None else x.detach() for x in (pair.teacher_hidden, pair.teacher_weight, pair.teacher_bias)
    ]
    if detached[0] is not None:
        detached[0] = _flat(detached[0]).to(dtype)
    arguments = (
        *differentiable, *detached, None if tokens is None else tokens.flatten(), scale_N, kind, options.temperature,
        options.softcap, beta, clip, limit, options.vocab_size or pair.student_weight.shape[0],
        options.vocab_group.group_name if options.vocab_group else "", backend, wanted,
    )  # fmt: skip
    if options.reduction == "none":
        loss_N, stats_SN = torch.ops.opsdl.token_losses(*arguments)
        return loss_N.reshape(pair.student_hidden.shape[:-1]), stats_SN
    loss, stats_SN, *_ = torch.ops.opsdl.reduced_loss(*arguments, True)
    return loss, stats_SN


def _by_formula(kind, pair: _Pair, tokens, options: _Options, beta: float, clip: float | None):
    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = reference.logits(hidden, weight, bias, options.temperature, options.softcap)
        return z[..., : options.vocab_size]

    z = logits(pair.student_hidden, pair.student_weight, pair.student_bias)
    if kind == "log_prob":
        values, stats = reference.log_prob(z, tokens), reference.statistics(z, None, None)
    else:
        z_teacher = logits(pair.teacher_hidden, *pair.teacher_head).detach()
        stats = reference.statistics(z.detach(), z_teacher, tokens)
        if kind == "kl":
            values = reference.divergence(z, z_teacher, beta)
            values = values if clip is None else values.clamp(max=clip)
        else:
            values = reference.policy_reverse_kl(z, z_teacher, tokens, "kl" if "kl" in kind else None)
            stats["advantage"] = stats["student_lse"] - stats["teacher_lse"] - stats["gap"]
            if "kl" in kind:
                stats["advantage"] = stats["advantage"] + stats["kl"]
    return reference.reduce(values, options.mask, options.token_weights, options.reduction), stats


def _product_dtype(pair: _Pair) -> torch.dtype:
    """dtype of the operands of every product: autocast's, or the widest of hidden states and head."""
    device = pair.student_hidden.device.type
    if torch.is_autocast_enabled(device) and pair.student_hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(pair.student_hidden.dtype, pair.student_weight.dtype)


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])
