"""Losses on hidden states and the head.

Read in this order: reference, moments, values, call, driver, engines, operators, api.
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
