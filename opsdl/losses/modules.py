"""The losses as modules: options once, tensors at each call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opsdl.losses.api import fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl


class _Loss(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FusedReverseKL(_Loss):
    """`fused_reverse_kl` with its scalars kept: FusedReverseKL(temperature=2.0)(hidden, head, teacher_hidden)."""

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | None = None,
        **tensors: Tensor | None,
    ):
        return fused_reverse_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, **tensors, **self.options
        )


class FusedPolicyReverseKL(_Loss):
    """`fused_policy_reverse_kl` with its scalar options kept."""

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | None,
        tokens: Tensor,
        **tensors: Tensor | None,
    ):
        return fused_policy_reverse_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, tokens, **tensors, **self.options
        )


class FusedLogProb(_Loss):
    """`fused_log_prob` with its scalar options kept."""

    def forward(self, hidden: Tensor, weight: Tensor, tokens: Tensor, **tensors: Tensor | None):
        return fused_log_prob(hidden, weight, tokens, **tensors, **self.options)
