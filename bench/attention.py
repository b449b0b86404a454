"""Attention of G responses to one shared prefix, forward and backward, against what one would do without opsdl.

    python -m bench.attention            # writes bench/results/attention.md; a few minutes

Causal attention of the prefix to itself and of each response to prefix and itself, and one step of decoding. Compared:
full rows, each with its own copy of the prefix; the prefix once and the responses over its repeated keys under a mask,
as prefix groupers do it; the same parts and merges as ours on torch's flash operator, upcast to float32 for its sums.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from opsdl.prefix.attention import partial, states

RESULTS = Path(__file__).parent / "results" / "attention.md"
G, P, T, HQ, HKV, D = 8, 4096, 128, 8, 2, 64
SCALE, ROUNDS = D**-0.5, 5
Inputs = list[Tensor]  # query, key, value, gradient for the output, each [B, H, L, D]
Part = tuple[Callable, Callable]

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def make(batch: int, length: int, dtype: torch.dtype) -> Inputs:
    return [torch.randn(batch, heads, length, D).to(dtype) for heads in (HQ, HKV, HKV, HQ)]


def full_rows(prefix: Inputs, rows: Inputs) -> list[Tensor]:
    """Gradients for query, key and value of G rows of prefix and response."""
    whole = [torch.cat([x.expand(G, -1, -1, -1), y], 2) for x, y in zip(prefix, rows, strict=True)]
    return with_gradients(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), whole)


def with_gradients(attention: Callable, inputs: Inputs) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:-1]]
    return list(torch.autograd.grad(attention(*leaves), leaves, inputs[-1]))


def grouped(prefix: Inputs, rows: Inputs) -> list[Tensor]:
    """The prefix once; each response over the repeated keys of the prefix and its own, under a mask."""
    mask = torch.ones(T, P + T, dtype=torch.bool).tril(P)
    leaves = [x.detach().requires_grad_() for x in (*prefix[:3], *rows[:3])]
    query_P, key_P, value_P, query, key, value = leaves
    out_P = sdpa(query_P, key_P, value_P, is_causal=True, enable_gqa=True)
    keys, values = (
        torch.cat([x.expand(G, -1, -1, -1), y], 2).repeat_interleave(HQ // HKV, 1)
        for x, y in ((key_P, key), (value_P, value))
    )
    out = sdpa(query, keys, values, attn_mask=mask)
    return list(torch.autograd.grad([out_P, out], leaves, [prefix[3], rows[3]]))


def fold(x: Tensor) -> Tensor:
    """[G, H, T, ...] -> [1, H, G T, ...]."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def unfold(x: Tensor) -> Tensor:
    return x[0].unflatten(1, (G, -1)).transpose(0, 1)


def parts(prefix: Inputs, rows: Inputs, part: Part, of_prefix: Callable) -> list[Tensor]:
    """Gradients for query, key and value of the prefix, then of the responses: partial attentions and their merge."""
    attend, backward = part
    grad_query_P, grad_key_P, grad_value_P = of_prefix(prefix)
    _, key_P, value_P, _ = prefix
    query, key, value, grad_out = rows
    out_1, lse_1 = attend(fold(query), key_P, value_P, False)
    out_2, lse_2 = attend(query, key, value, True)
    out, lse = partial.merge(unfold(out_1), unfold(lse_1), out_2, lse_2)
    grads = backward(fold(grad_out), fold(query), key_P, value_P, fold(out), fold(lse), False)
    own = backward(grad_out, query, key, value, out, lse, True)
    results = (grad_query_P, grad_key_P + grads[1], grad_value_P + grads[2], unfold(grads[0]) + own[0], *own[1:])
    return [x.to(query.dtype) for x in results]


def ours(prefix: Inputs, rows: Inputs) -> list[Tensor]:
    def attend(query, key, value, causal):
        return partial.attend(query, key, value, SCALE, causal)

    def backward(grad_out, query, key, value, out, lse, causal):
        return partial.attend_backward(grad_out, query, key, value, out, lse, SCALE, causal)

    def of_prefix(inputs):
        *inputs, grad_out = inputs
        return backward(grad_out, *inputs, *attend(*inputs, True), True)

    return parts(prefix, rows, (attend, backward), of_prefix)


def torch_parts(prefix: Inputs, rows: Inputs) -> list[Tensor]:
    def attend(query, key, value, causal):
        query, key, value = query.float(), key.float(), value.float()
        if causal:
            return flash(query, key, value, 0.0, causal, scale=SCALE)
        folded = query.unflatten(1, (HKV, -1)).flatten(2, 3)
        out, lse = flash(folded, key, value, 0.0, causal, scale=SCALE)
        return out.reshape(query.shape), lse.reshape(query.shape[:3])

    def backward(grad_out, query, key, value, out, lse, causal):
        inputs = [x.float() for x in (grad_out, query, key, value)]
        return flash_backward(*inputs, out, lse, 0.0, causal, scale=SCALE)

    def of_prefix(inputs):
        return with_gradients(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), inputs)

    return parts(prefix, rows, (attend, backward), of_prefix)


def decoding(prefix: Inputs, dtype: torch.dtype) -> dict[str, Callable]:
    """A token of each of G rows over the prefix, and over a copy of the prefix for each row."""
    query_G = torch.randn(G, HQ, 1, D).to(dtype)
    _, key, value, _ = prefix
    copies = [x.repeat(G, 1, 1, 1) for x in (key, value)]
    by_token = [x[0].transpose(0, 1) for x in (key, value)]
    return {
        "ours": lambda: [states.prefix_decode(query_G[:, :, 0], *by_token, SCALE, length=P)[0]],
        "SDPA over repeated keys": lambda: [sdpa(query_G, *copies, enable_gqa=True)],
    }


def seconds(ways: dict[str, Callable], repeat: int) -> dict[str, float]:
    """Median over rounds that each run every way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            found[name].append((time.perf_counter() - start) / repeat)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    lines = [
        "# Attention over a shared prefix\n",
        f"`python -m bench.attention`: G = {G} responses of T = {T} tokens over a prefix of P = {P}, Hq = {HQ},",
        f"Hkv = {HKV}, D = {D}, 2 threads, medians of {ROUNDS} rounds in which the ways take turns.\n",
        "| what | dtype | way | ms | ours is faster by |\n|---|---|---|---|---|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        prefix, rows = make(1, P, dtype), make(G, T, dtype)
        training = {
            "ours": lambda p=prefix, r=rows: ours(p, r),
            "full rows, SDPA": lambda p=prefix, r=rows: full_rows(p, r),
            "prefix once, SDPA over repeated keys": lambda p=prefix, r=rows: grouped(p, r),
            "the same parts, torch's flash operator": lambda p=prefix, r=rows: torch_parts(p, r),
        }
        for x, y in zip(ours(prefix, rows), grouped(prefix, rows), strict=True):
            assert (x.double() - y.double()).norm() < 2e-2 * y.double().norm()
        for what, ways, repeat in (
            ("forward + backward", training, 1), ("decoding step", decoding(prefix, dtype), 50),
        ):  # fmt: skip
            times = seconds(ways, repeat)
            for name, took in times.items():
                ratio = took / times["ours"]
                lines.append(f"| {what} | {str(dtype)[6:]} | {name} | {took * 1e3:.2f} | {ratio:.2f} |")
    RESULTS.write_text("\n".join(lines) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
