"""A head sharded over 2 and 4 gloo processes against one process: values, statistics, every gradient."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from opsdl.losses import fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl

N, H, V = 13, 10, 101  # V does not divide by the number of ranks


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    student = draw(N, H)
    return student, draw(V, H), student + 0.3 * draw(N, H), draw(V, H), draw(V), draw(V), torch.arange(N) * 7


def losses(shard, group):
    """Each loss with its gradients for hidden states, head shard and bias shard."""
    student, weight, teacher, teacher_weight, bias, teacher_bias, tokens = make_inputs()
    mask = torch.arange(N) % 4 != 1
    out = []
    for name in ("shared", "separate", "capped", "policy", "none", "log_prob"):
        h, w, b = (x.clone().requires_grad_() for x in (student, weight[shard], bias[shard]))
        options = dict(student_bias=b, mask=mask, vocab_group=group)
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
            value = fused_log_prob(h, w, tokens, bias=b, mask=mask, vocab_group=group)
        weights = torch.linspace(1, 2, N, dtype=torch.float64) if value.ndim else torch.tensor(1.5, dtype=torch.float64)
        out.extend([value.detach(), *torch.autograd.grad((value * weights).sum(), (h, w, b))])
    return out


def worker(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    sizes = torch.full((world,), V // world)
    sizes[0] += V % world
    end = int(sizes[: rank + 1].sum())
    start = end - int(sizes[rank])
    shard = slice(start, end)
    for got, expected in zip(losses(shard, dist.group.WORLD), losses(slice(None), None), strict=True):
        if got.shape != expected.shape:  # of the head or its bias: this rank's rows
            expected = expected[shard]
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-13)
    with open(os.path.join(folder, f"done-{rank}"), "w"):
        pass
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_head_equals_one_process(world, tmp_path):
    multiprocessing.spawn(worker, (world, str(tmp_path)), nprocs=world)
    assert len(list(tmp_path.glob("done-*"))) == world
