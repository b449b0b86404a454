"""What a whole call through the Triton backend allocates; the launches, which allocate nothing, are left out."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opsdl.losses import driver
from opsdl.losses.call import Call, Wanted
from opsdl.losses.values import Value
from tests.support.gpu import launches

MIB = 1 << 20


class Live(TorchDispatchMode):
    """Peak of the bytes in storages that were made within and are still alive."""

    def __init__(self, *given):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or size == 0:
            return
        self.seen.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.seen.discard(key)
        self.bytes -= size


@pytest.mark.parametrize("skip", [0.0, 0.5])
@pytest.mark.parametrize("one_head", [True, False], ids=["one head", "two heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_at_most_64_mib_beyond_the_gradients(dtype, one_head, skip):
    tokens, size, vocabulary = 6000, 2048, 3000
    student, teacher = (torch.randn(tokens, size).to(dtype) for _ in range(2))
    head, other = (torch.randn(vocabulary, size).to(dtype) for _ in range(2))
    call = Call(
        hidden_NH=student, weight_VH=head, bias_V=None, teacher_hidden_NK=teacher,
        teacher_weight_VK=None if one_head else other, teacher_bias_V=None, tokens_N=None, scale_N=torch.rand(tokens),
        value=Value.KL, temperature=1.0, softcap=None, beta=1.0, clip=None, skip_tolerance=skip, vocab_size=vocabulary,
        group="", backend="triton", wanted=Wanted(True, True, False),
    )  # fmt: skip
    launched = []

    def launch(this):
        launched.append(this.name)
        if this.name == "moments_kernel":
            this.arguments["moments_ptr"].fill_(1.0)

    with launches.substituted(launch), Live(student, teacher, head, other, call.scale_N) as live:
        driver.run(call)
    assert {"moments_kernel", "gradient_kernel", "product_kernel"} <= set(launched)
    gradients = tokens * size * dtype.itemsize + vocabulary * size * 4
    assert live.peak - gradients <= 64 * MIB, f"{(live.peak - gradients) / MIB:.1f} MiB"
    assert live.peak > gradients  # it counts
