"""Random operands of attention, dense attention in float64, and errors relative to it."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

SCALE = 0.3


def make(B, Hq, Hkv, Lq, Lk, D, dtype, seed=0):
    """query, key, value, grad_out."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D), (B, Hq, Lq, D)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def dense(query, key, value, grad_out, causal, dtype=torch.float64):
    """out, lse, and the gradients, in `dtype`; lse is None where torch's own operator does the work."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    q, k, v = inputs
    k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (k, v))
    lse = None
    if dtype == torch.float64:
        scores = q @ k.mT * SCALE
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=dtype).triu(1)
        lse, out = scores.logsumexp(-1), scores.softmax(-1) @ v
    else:
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALE)
    return out, lse, torch.autograd.grad(out, inputs, grad_out.to(dtype))


def error(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


def close(x, truth, limit=1e-5):
    """Relative; a gradient that is 0 but for rounding (one key's, through the softmax) has no relative error."""
    return truth.norm() < 1e-9 and x.norm() < 1e-4 or error(x, truth) <= limit
