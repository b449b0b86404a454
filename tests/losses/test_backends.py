"""Which backend serves, and what is said where the best one is missing."""

import warnings

import pytest
import torch

from opsdl.losses import backends, fused_reverse_kl
from tests.support.losses import make_pair


def test_without_the_extension_auto_is_torch_and_says_so_once(monkeypatch):
    monkeypatch.setitem(backends._STATES, "cpu", "not built (for this test)")
    backends._say_once.cache_clear()
    inputs = make_pair(0.3)[:3]
    with pytest.warns(UserWarning, match="loss backend 'cpu' is not built.*using 'torch'") as caught:
        value = fused_reverse_kl(*inputs)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fused_reverse_kl(*inputs), value)
    assert torch.equal(value, fused_reverse_kl(*inputs, backend="torch"))
    with pytest.raises(ValueError, match="backend: 'cpu' is not built"):
        fused_reverse_kl(*inputs, backend="cpu")
    backends._say_once.cache_clear()
