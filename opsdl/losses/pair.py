"""Student and teacher as the two KL losses take them: checked together, the teacher detached."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.losses import reference, terms
from opsdl.losses.arguments import Head, check_head, check_pair, check_scalars
from opsdl.losses.shards import Shards


class Pair:
    """Student and teacher over the same tokens and vocabulary, checked."""

    def __init__(
        self, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias, temperature,
        softcap, vocab_group,
    ):  # fmt: skip
        self.shared = teacher_weight is None
        if self.shared and teacher_bias is not None:
            raise ValueError("teacher_bias: given without teacher_weight; expected both or neither")
        check_head("student", student_hidden, student_weight, student_bias)
        check_scalars(temperature, softcap)
        self.student = Head(student_weight, student_bias, temperature, softcap)
        self.teacher = self.student if self.shared else Head(teacher_weight, teacher_bias, temperature, softcap)
        self.teacher = self.teacher.detached()
        check_head("teacher", teacher_hidden, self.teacher.weight, self.teacher.bias)
        check_pair(student_hidden, student_weight, teacher_hidden, self.teacher.weight)
        self.student_hidden, self.teacher_hidden = student_hidden.detach(), teacher_hidden.detach()
        self.shards = Shards.of(student_weight.shape[0], vocab_group, student_hidden.device)

    def gap(self, tokens_n: Tensor, z_nV: Tensor) -> Tensor:
        """Student minus teacher logit of some tokens."""
        student_nH, teacher_nH = (
            x.reshape(-1, x.shape[-1])[tokens_n] for x in (self.student_hidden, self.teacher_hidden)
        )
        return terms.gap(z_nV, student_nH, self.student.detached(), teacher_nH, self.teacher, self.shared)

    def teacher_logits(self) -> Tensor:
        return reference.logits(self.teacher_hidden, *self.teacher)

    @torch.no_grad()
    def statistics(self, z: Tensor) -> dict[str, Tensor]:
        """What `terms.reverse_kl` reports, by the plain formulas."""
        z_teacher, log_p = self.teacher_logits(), z.log_softmax(-1)
        return {
            "kl": reference.reverse_kl(z, z_teacher),
            "student_lse": z.logsumexp(-1),
            "teacher_lse": z_teacher.logsumexp(-1),
            "entropy": -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1),
        }
