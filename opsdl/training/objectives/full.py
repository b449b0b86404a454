"""OPSDL over the whole vocabulary (arXiv 2604.17535, algorithm 1): KL(student || teacher) at every response token.

The student answers under the long context; the teacher scores the same tokens under the short one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from opsdl.losses import fused_reverse_kl
from opsdl.training.objectives.base import LossOutput
from opsdl.training.objectives.on_policy import OnPolicy

if TYPE_CHECKING:
    from opsdl.training.groups import Rollout
    from opsdl.training.policy import Policy


@dataclass
class FullReverseKL(OnPolicy):
    """Config: `loss: {kind: full}`."""

    needs_teacher: ClassVar[bool] = True
    phrase: ClassVar[str] = "the whole-vocabulary reverse KL"

    def loss(self, student: Policy, teacher: Policy, rollouts: Sequence[Rollout]) -> LossOutput:
        teacher_NH = teacher.hidden(rollouts, "short", gradient=False)
        student_NH = student.hidden(rollouts, "long", gradient=True)
        head, teacher_head = student.head, teacher.head_beside(student)
        with student.loss_autocast():
            total, stats = fused_reverse_kl(
                student_NH,
                head.weight,
                teacher_NH,
                teacher_head.weight,
                student_bias=head.bias,
                teacher_bias=teacher_head.bias,
                softcap=head.softcap,
                reduction="sum",
                return_stats=True,
            )
        return LossOutput(total, {"kl": stats["kl"], "entropy": stats["entropy"]})
