"""OPSDL in the paper's sampled-token form (arXiv 2604.17535, equations 2 and 3).

    A_t = log q(y_t) - log p(y_t), held constant        loss = - sum_t A_t log p(y_t)

Its expected gradient is that of the full form at the same prefixes; its variance is larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from opsdl.config import one_of
from opsdl.losses import fused_policy_reverse_kl
from opsdl.training.objectives.base import LossOutput
from opsdl.training.objectives.on_policy import OnPolicy

if TYPE_CHECKING:
    from opsdl.training.groups import Rollout
    from opsdl.training.policy import Policy


@dataclass
class PolicyReverseKL(OnPolicy):
    """Config: `loss: {kind: policy}`."""

    baseline: str | None = one_of(None, None, "kl")  # "kl" subtracts the expected advantage: same mean, less variance

    needs_teacher: ClassVar[bool] = True
    phrase: ClassVar[str] = "the sampled-token form of the reverse KL"

    def loss(self, student: Policy, teacher: Policy, rollouts: Sequence[Rollout]) -> LossOutput:
        teacher_NH = teacher.hidden(rollouts, "short", gradient=False)
        student_NH = student.hidden(rollouts, "long", gradient=True)
        head, teacher_head = student.head, teacher.head_beside(student)
        with student.loss_autocast():
            total, stats = fused_policy_reverse_kl(
                student_NH,
                head.weight,
                teacher_NH,
                teacher_head.weight,
                torch.cat([rollout.responses.packed_tokens for rollout in rollouts]),
                baseline=self.baseline,
                student_bias=head.bias,
                teacher_bias=teacher_head.bias,
                softcap=head.softcap,
                reduction="sum",
                return_stats=True,
            )
        return LossOutput(total, {"kl": stats["kl"], "entropy": stats["entropy"]})
