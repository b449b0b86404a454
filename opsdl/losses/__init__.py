"""Losses on hidden states and the head. Read in this order: reference, terms, chunked, shards, functional."""

from opsdl.losses.functional import (
    FusedReverseKL,
    available_backends,
    fused_log_prob,
    fused_policy_reverse_kl,
    fused_reverse_kl,
)

__all__ = ["FusedReverseKL", "available_backends", "fused_log_prob", "fused_policy_reverse_kl", "fused_reverse_kl"]
