"""The losses as modules: the settings once, checked when the module is made, and the tensors at each call."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Unpack

from torch import Tensor, nn

from opsdl.losses.api import Stats, fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl
from opsdl.losses.arguments import check_options
from opsdl.losses.options import KLSettings, PolicySettings, Settings


class _Loss(nn.Module):
    def __init__(self, known: Iterable[str], given: Mapping[str, Any], return_stats: bool) -> None:
        super().__init__()
        for name in given:
            self._check_name(name, sorted({*known, "return_stats"}))
        check_options(**given)
        self.return_stats = return_stats
        self._shown = dict(given) | ({"return_stats": True} if return_stats else {})

    def _check_name(self, name: str, known: list[str]) -> None:
        if name in known:
            return
        if name in inspect.signature(self.forward).parameters:
            raise TypeError(f"{type(self).__name__}: {name} is a tensor; give it at each call, not here")
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
        raise TypeError(f"{type(self).__name__}: no option {name!r}; {hint}")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._shown.items())


class FusedReverseKL(_Loss):
    """`fused_reverse_kl` with its settings kept: FusedReverseKL(temperature=2.0)(hidden, head, teacher_hidden).

    Args:
        return_stats: Whether calls return the statistics too.
        settings: temperature, softcap, beta, clip, vocab_size, reduction, skip_tolerance, vocab_group and backend, as
            in `fused_reverse_kl`.

    Raises:
        TypeError: There is no such setting, or it is a tensor, which belongs to the call.
        ValueError: A setting has a wrong value.
    """

    def __init__(self, *, return_stats: bool = False, **settings: Unpack[KLSettings]) -> None:
        super().__init__(KLSettings.__optional_keys__, settings, return_stats)
        self.settings = settings

    def forward(
        self,
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
    ) -> Tensor | tuple[Tensor, Stats]:
        """Compute the loss; arguments, returns and errors are those of `fused_reverse_kl`."""
        return fused_reverse_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias=student_bias,
            teacher_bias=teacher_bias, tokens=tokens, mask=mask, token_weights=token_weights,
            return_stats=self.return_stats, **self.settings,
        )  # fmt: skip


class FusedPolicyReverseKL(_Loss):
    """`fused_policy_reverse_kl` with its settings kept.

    Args:
        return_stats: Whether calls return the statistics too.
        settings: baseline, temperature, softcap, vocab_size, reduction, skip_tolerance, vocab_group and backend, as in
            `fused_policy_reverse_kl`.

    Raises:
        TypeError: There is no such setting, or it is a tensor, which belongs to the call.
        ValueError: A setting has a wrong value.
    """

    def __init__(self, *, return_stats: bool = False, **settings: Unpack[PolicySettings]) -> None:
        super().__init__(PolicySettings.__optional_keys__, settings, return_stats)
        self.settings = settings

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | None,
        tokens: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Stats]:
        """Compute the loss; arguments, returns and errors are those of `fused_policy_reverse_kl`."""
        return fused_policy_reverse_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, student_bias=student_bias,
            teacher_bias=teacher_bias, mask=mask, token_weights=token_weights, return_stats=self.return_stats,
            **self.settings,
        )  # fmt: skip


class FusedLogProb(_Loss):
    """`fused_log_prob` with its settings kept.

    Args:
        return_stats: Whether calls return the statistics too.
        settings: temperature, softcap, vocab_size, reduction, skip_tolerance, vocab_group and backend, as in
            `fused_log_prob`.

    Raises:
        TypeError: There is no such setting, or it is a tensor, which belongs to the call.
        ValueError: A setting has a wrong value.
    """

    def __init__(self, *, return_stats: bool = False, **settings: Unpack[Settings]) -> None:
        super().__init__(Settings.__optional_keys__, settings, return_stats)
        self.settings = settings

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Stats]:
        """Compute the loss; arguments, returns and errors are those of `fused_log_prob`."""
        return fused_log_prob(
            hidden, weight, tokens, bias=bias, mask=mask, token_weights=token_weights, return_stats=self.return_stats,
            **self.settings,
        )  # fmt: skip
