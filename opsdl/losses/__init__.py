"""Losses on hidden states and the head.

Read in this order: reference has the formulas; moments and values have the same without cancellation; call says what
one call of a loss consists of, teacher how the teacher enters it, and driver in what order it is computed; engine says
what an engine does, and engines/ has them; operators are the losses for autograd; checked and api are what users call.

A suffix says the shape of a tensor: x_NH is [N, H], of

    N, n   tokens of a call, of a block            V, v   vocabulary entries of this rank, of a part
    H, K   hidden units of student, of teacher     k, s   parts of the vocabulary: tiles, and steps of several tiles
    S      statistics                              f      fields of the moments
"""

from opsdl.losses.api import fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl
from opsdl.losses.backends import available_backends
from opsdl.losses.modules import FusedLogProb, FusedPolicyReverseKL, FusedReverseKL

__all__ = [
    "FusedLogProb",
    "FusedPolicyReverseKL",
    "FusedReverseKL",
    "available_backends",
    "fused_log_prob",
    "fused_policy_reverse_kl",
    "fused_reverse_kl",
]
