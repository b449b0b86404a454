"""A head sharded over gloo processes against one process, and one as a DTensor: values, statistics, gradients."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from opsdl.losses import fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl
from tests.support.losses import assert_close, has, leaves, small_inputs

N, H, V = 13, 10, 101  # V does not divide by the number of ranks


def make_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    student = draw(N, H)
    return student, draw(V, H), student + 0.3 * draw(N, H), draw(V, H), draw(V), draw(V), torch.arange(N) * 7


def losses(shard, group, dtype, backend):
    """Each loss with its gradients for hidden states, head shard and bias shard."""
    student, weight, teacher, teacher_weight, bias, teacher_bias, tokens = make_inputs(dtype)
    mask = torch.arange(N) % 4 != 1
    out = []
    for name in ("shared", "separate", "capped", "policy", "none", "log_prob"):
        h, w, b = (x.clone().requires_grad_() for x in (student, weight[shard], bias[shard]))
        options = dict(student_bias=b, mask=mask, vocab_group=group, backend=backend)
        pair = (h, w, teacher, teacher_weight[shard])
        if name == "shared":
            value = fused_reverse_kl(h, w, teacher, **options)
        elif name == "separate":
            value = fused_reverse_kl(*pair, teacher_bias=teacher_bias[shard], skip_tolerance=1e-12, **options)
        elif name == "capped":
            value = fused_reverse_kl(h, w, teacher, softcap=3.0, temperature=0.8, **options)
        elif name == "policy":
            value = fused_policy_reverse_kl(*pair, tokens, baseline="kl", reduction="sum", **options)
        elif name == "none":
            value, stats = fused_reverse_kl(*pair, reduction="none", return_stats=True, **options)
            out.extend(stats.values())
        else:
            value = fused_log_prob(h, w, tokens, bias=b, mask=mask, vocab_group=group, backend=backend)
        weights = torch.linspace(1, 2, N, dtype=dtype) if value.ndim else torch.tensor(1.5, dtype=dtype)
        out.extend([value.detach(), *torch.autograd.grad((value * weights).sum(), (h, w, b))])
    return out


def worker(rank, world, folder, *backends):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    sizes = torch.full((world,), V // world)
    sizes[0] += V % world
    end = int(sizes[: rank + 1].sum())
    start = end - int(sizes[rank])
    shard = slice(start, end)
    for backend in backends:
        dtype, rtol = (torch.float64, 1e-10) if backend == "torch" else (torch.float32, 1e-5)
        sharded, whole = losses(shard, dist.group.WORLD, dtype, backend), losses(slice(None), None, dtype, backend)
        for got, expected in zip(sharded, whole, strict=True):
            if got.shape != expected.shape:  # of the head or its bias: this rank's entries
                expected = expected[shard]
            assert torch.allclose(got, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
    with open(os.path.join(folder, f"done-{rank}"), "w"):
        pass
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_head_equals_one_process(world, tmp_path):
    """In float64 with backend "torch", and in float32 with "cpu" where it is there."""
    backends = [name for name in ("torch", "cpu") if has(name)]
    multiprocessing.spawn(worker, (world, str(tmp_path), *backends), nprocs=world)
    assert len(list(tmp_path.glob("done-*"))) == world


def sharded_head(rank, folder):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    student, weight, teacher, *_ = small_inputs()
    h, w = leaves(student, weight)
    expected = fused_reverse_kl(h, w, teacher)
    expected.backward()
    mesh = init_device_mesh("cpu", (2,))
    head, h_sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_(), student.clone().requires_grad_()
    got = fused_reverse_kl(h_sharded, head, teacher)
    got.backward()
    assert head.grad.placements == (Shard(0),) and head.grad.to_local().shape[0] == len(weight) // 2
    got = [got.detach(), h_sharded.grad, head.grad.full_tensor()]
    assert_close(got, [expected.detach(), h.grad, w.grad])
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()


def test_dtensor_head(tmp_path):
    multiprocessing.spawn(sharded_head, (tmp_path,), nprocs=2)
    assert len(list(tmp_path.glob("done-*"))) == 2
