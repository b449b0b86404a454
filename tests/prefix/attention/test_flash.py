"""What attention/flash.py gives to and takes from torch's flash attention: by fake CUDA tensors, and on a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opsdl.prefix.attention import flash, partial


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shapes_and_types(dtype, causal):
    with FakeTensorMode():
        query = torch.empty(2, 8, 16, 64, dtype=dtype, device="cuda")
        key = torch.empty(2, 2, 16 if causal else 40, 64, dtype=dtype, device="cuda")
        out, lse = flash.attend(query, key, key, 0.125, causal)
        assert out.shape == query.shape and out.dtype == torch.float32
        assert lse.shape == query.shape[:3] and lse.dtype == torch.float32
        gradients = flash.attend_backward(out, query, key, key, out, lse, 0.125, causal, True)
        assert [x.shape for x in gradients] == [query.shape, key.shape, key.shape]
        detached = flash.attend_backward(out, query, key, key, out, lse, 0.125, causal, False)
        assert [x.numel() for x in detached] == [query.numel(), 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("length", [1, 63, 300])
def test_against_float64_on_a_gpu(length):
    query, grad = (torch.randn(1, 8, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    key, value = (torch.randn(1, 2, 500, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse = flash.attend(query, key, value, 0.125, False)
    got = [out, *flash.attend_backward(grad, query, key, value, out, lse, 0.125, False, True)]
    wide = [x.double() for x in (query, key, value)]
    true_out, true_lse = partial.attend_in_torch(*wide, 0.125, False)
    expected = partial.attend_backward_in_torch(grad.double(), *wide, true_out, true_lse, 0.125, False, True)
    for x, y in zip(got, [true_out, *expected], strict=True):
        assert (x - y).norm() <= 1e-2 * y.norm()
