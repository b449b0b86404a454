"""The engine in torch."""

import torch

from opsdl.losses import fused_reverse_kl
from tests.support.losses import PAIR_SHAPE, make_pair

_, _, V = PAIR_SHAPE


def test_many_blocks_equal_one(monkeypatch):
    student, weight, teacher, _ = make_pair(0.1)
    outs = []
    for block_bytes in (1 << 30, V * 4 * 5):  # one block; blocks of 5 tokens, the last of 2
        monkeypatch.setattr("opsdl.losses.engines.torch.BLOCK_BYTES", block_bytes)
        h, w = (x.clone().requires_grad_() for x in (student, weight))
        loss = fused_reverse_kl(h, w, teacher)
        loss.backward()
        outs.append((loss.detach(), h.grad, w.grad))
    for x, y in zip(*outs, strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-8)
