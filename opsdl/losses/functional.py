"""The public losses: check the arguments, choose the backend, flatten, run, shape the result.

    loss = opsdl.fused_reverse_kl(student_hidden, head, teacher_hidden, mask=mask)      # live self-teacher: one head
    loss.backward()                                                                     # dHidden and dHead

Backends: "reference" is the formula on materialised logits (any dtype, for reading and testing); "torch" works in
blocks of tokens and never holds the logits of more than one block. "auto" takes "torch".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opsdl.losses import reference, terms
from opsdl.losses.arguments import Head, check_head, check_scalars, check_tokens, token_scale
from opsdl.losses.chunked import Block, ChunkedLoss, Student
from opsdl.losses.pair import Pair
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
    the token. token_weights [...] multiply the tokens' losses. Logits are softcap * tanh(z / softcap) / temperature for
    both; the loss carries no temperature^2 factor.

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
    pair = Pair(
        student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
        temperature, softcap, vocab_group,
    )  # fmt: skip
    return _run(
        student_hidden,
        pair.student,
        pair.shards,
        Options(mask, token_weights, reduction, skip_tolerance, backend, return_stats),
        on_logits=lambda z: (reference.reverse_kl(z, pair.teacher_logits()), pair.statistics(z)),
        on_block=lambda tokens_n, z_nV: terms.reverse_kl(z_nV, pair.gap(tokens_n, z_nV), pair.shards),
    )


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
    if baseline not in (None, "kl"):
        raise ValueError(f"baseline: {baseline!r}; expected None or 'kl'")
    pair = Pair(
        student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
        temperature, softcap, vocab_group,
    )  # fmt: skip
    check_tokens(tokens, student_hidden.shape[:-1], pair.shards.total)
    flat = tokens.flatten()

    def on_logits(z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return reference.policy_reverse_kl(z, pair.teacher_logits(), tokens, baseline), pair.statistics(z)

    def on_block(tokens_n: Tensor, z_nV: Tensor) -> Block:
        return terms.policy_reverse_kl(z_nV, pair.gap(tokens_n, z_nV), flat[tokens_n], baseline, pair.shards)

    options = Options(mask, token_weights, reduction, skip_tolerance, backend, return_stats)
    return _run(student_hidden, pair.student, pair.shards, options, on_logits, on_block)


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
    check_scalars(temperature, softcap)
    shards = Shards.of(weight.shape[0], vocab_group, hidden.device)
    check_tokens(tokens, hidden.shape[:-1], shards.total)
    flat = tokens.flatten()
    return _run(
        hidden,
        Head(weight, bias, temperature, softcap),
        shards,
        Options(mask, token_weights, reduction, skip_tolerance, backend, return_stats=False),
        on_logits=lambda z: (reference.log_prob(z, tokens), {}),
        on_block=lambda tokens_n, z_nV: terms.log_prob(z_nV, flat[tokens_n], shards),
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
        check_scalars(temperature, softcap)
        self.options = dict(
            temperature=temperature, softcap=softcap, reduction=reduction, skip_tolerance=skip_tolerance,
            vocab_group=vocab_group, backend=backend, return_stats=return_stats,
        )  # fmt: skip

    def forward(self, student_hidden, student_weight, teacher_hidden, teacher_weight=None, **tensors):
        return fused_reverse_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, **tensors, **self.options
        )


@dataclass(frozen=True)
class Options:
    """What is done with the per-token values."""

    mask: Tensor | None
    token_weights: Tensor | None
    reduction: str
    skip_tolerance: float | str | None
    backend: str
    return_stats: bool


def _run(
    hidden: Tensor,
    head: Head,
    shards: Shards,
    options: Options,
    on_logits: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    on_block: Callable[[Tensor, Tensor], Block],
):
    """Reduce the per-token values that `on_logits` makes of all logits, or `on_block` of those of a block."""
    leading = hidden.shape[:-1]
    scale_N = token_scale(leading, options.mask, options.token_weights, options.reduction, like=hidden)
    tolerance = _tolerance(options.skip_tolerance, hidden.dtype)
    if _choose(options.backend, shards.group) == "reference":
        values, stats = on_logits(reference.logits(hidden, *head))
        stats = {name: x.masked_fill(scale_N.reshape(leading) == 0, 0.0) for name, x in stats.items()}
        out = reference.reduce(values, options.mask, options.token_weights, options.reduction)
    else:
        flat, stats = hidden.reshape(-1, hidden.shape[-1]), {}
        student = Student(flat.detach(), head.detached(), on_block, shards, tolerance)
        with torch.autocast(hidden.device.type, enabled=False):
            out = ChunkedLoss.apply(flat, head.weight, head.bias, scale_N, student, options.reduction == "none", stats)
        stats = {name: x.reshape(leading) for name, x in stats.items()}
        if options.reduction == "none":
            out = out.reshape(leading)
    return (out, stats) if options.return_stats else out


def _choose(backend: str, vocab_group: dist.ProcessGroup | None) -> str:
    if backend == "reference" and vocab_group is not None:
        raise ValueError("vocab_group: given with backend 'reference'; expected None there")
    if backend == "auto":
        return "torch"
    if BACKENDS.get(backend) != "available":
        raise ValueError(f"backend: {backend!r}; expected 'auto' or one of {', '.join(BACKENDS)}")
    return backend


def _tolerance(value: float | str | None, dtype: torch.dtype) -> float:
    if value == "auto":
        return torch.finfo(dtype).eps / 4
    if value is None:
        return 0.0
    if isinstance(value, str) or not 0 <= value < 1:
        raise ValueError(f"skip_tolerance: {value!r}; expected None, 'auto' or a number in [0, 1)")
    return float(value)
