"""Attention of G responses to one shared prefix, forward and backward, against what one would do without opsdl.

    python -m bench.attention            # into bench/results/attention.{json,md}; a few minutes

Causal attention of the prefix to itself and of each response to prefix and itself, and one step of decoding. Compared:
full sequences, each with its own copy of the prefix; the prefix once and the responses over its repeated keys under a
mask, as prefix groupers do it; the same parts and merges as ours on torch's flash operator, upcast to float32 for its
sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench import harness
from bench.harness import Say, Step
from bench.results import Case, Number, Result, measured, origin, publish
from bench.tables import Report, Table, fixed

NAME = "attention"
DTYPES = ("float32", "bfloat16")
Inputs = list[Tensor]  # query, key, value, gradient for the output, each [B, H, L, D]
Attend = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Size:
    G: int = 8
    P: int = 4096
    T: int = 128
    Hq: int = 8
    Hkv: int = 2
    D: int = 64

    @property
    def scale(self) -> float:
        return self.D**-0.5


def main(arguments: list[str] | None = None) -> None:
    options = harness.parse(harness.parser(NAME, __doc__), arguments)
    size = Size(G=2, P=64, T=8) if options.quick else Size()
    cases = [case for dtype in DTYPES for case in measure(size, dtype, harness.speaker(dtype))]
    settings = {"rounds": harness.ROUNDS, **asdict(size)}
    result = measured(NAME, options.command, settings, cases)
    publish(result, report(result), options.out)


def measure(size: Size, dtype: str, say: Say) -> list[Case]:
    torch.manual_seed(0)
    prefix, responses = make(size, 1, size.P, dtype), make(size, size.G, size.T, dtype)
    ways = {
        "ours": partial(ours, size, prefix, responses),
        "full sequences, SDPA": partial(full_sequences, size, prefix, responses),
        "prefix once, SDPA over repeated keys": partial(grouped, size, prefix, responses),
        "the same parts, torch's flash operator": partial(torch_parts, size, prefix, responses),
    }
    for x, y in zip(ways["ours"](), grouped(size, prefix, responses), strict=True):
        assert (x.double() - y.double()).norm() < 2e-2 * y.double().norm()
    training = harness.time_in_turn(ways, say=say)
    decoding = harness.time_in_turn(decode_steps(size, prefix, dtype), repeat=50, say=say)
    return [*cases_of("forward + backward", dtype, training), *cases_of("decoding step", dtype, decoding)]


def cases_of(what: str, dtype: str, times: dict[str, list[float]]) -> list[Case]:
    return [
        Case(
            name, name, {"what": what, "dtype": dtype},
            {"time": Number.timed(rounds, "ms"), "ratio": Number.ratio(rounds, times["ours"])},
        )
        for name, rounds in times.items()
    ]  # fmt: skip


def make(size: Size, batch: int, length: int, dtype: str) -> Inputs:
    heads = (size.Hq, size.Hkv, size.Hkv, size.Hq)
    return [torch.randn(batch, count, length, size.D).to(getattr(torch, dtype)) for count in heads]


def full_sequences(size: Size, prefix: Inputs, responses: Inputs) -> list[Tensor]:
    """Gradients for query, key and value of G sequences of prefix and response."""
    whole = [torch.cat([x.expand(size.G, -1, -1, -1), y], 2) for x, y in zip(prefix, responses, strict=True)]
    return causal_gradients(whole)


def causal_gradients(inputs: Inputs) -> list[Tensor]:
    query, key, value = leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    return list(torch.autograd.grad(sdpa(query, key, value, is_causal=True, enable_gqa=True), leaves, inputs[3]))


def grouped(size: Size, prefix: Inputs, responses: Inputs) -> list[Tensor]:
    """The prefix once; each response over the repeated keys of the prefix and its own, under a mask."""
    mask = torch.ones(size.T, size.P + size.T, dtype=torch.bool).tril(size.P)
    leaves = [x.detach().requires_grad_() for x in (*prefix[:3], *responses[:3])]
    query_P, key_P, value_P, query, key, value = leaves
    out_P = sdpa(query_P, key_P, value_P, is_causal=True, enable_gqa=True)
    keys, values = (
        torch.cat([x.expand(size.G, -1, -1, -1), y], 2).repeat_interleave(size.Hq // size.Hkv, 1)
        for x, y in ((key_P, key), (value_P, value))
    )
    out = sdpa(query, keys, values, attn_mask=mask)
    return list(torch.autograd.grad([out_P, out], leaves, [prefix[3], responses[3]]))


def operators() -> ModuleType:
    """Imported late: this brings transformers, which `bench.report` has no need of."""
    from opsdl.prefix.attention import partial as attention

    return attention


def parts(
    size: Size, prefix: Inputs, responses: Inputs, attend: Attend, backward: Backward, of_prefix: list[Tensor]
) -> list[Tensor]:
    """Gradients for query, key and value of the prefix, then of the responses: partial attentions and their merge.

    `of_prefix` are the gradients that the prefix has from its attention to itself.
    """

    def fold(x: Tensor) -> Tensor:  # [G, H, T, ...] -> [1, H, G T, ...]
        return x.transpose(0, 1).flatten(1, 2)[None]

    def unfold(x: Tensor) -> Tensor:
        return x[0].unflatten(1, (size.G, -1)).transpose(0, 1)

    _, key_P, value_P, _ = prefix
    query, key, value, grad_out = responses
    out_1, lse_1 = attend(fold(query), key_P, value_P, False)
    out_2, lse_2 = attend(query, key, value, True)
    out, lse = operators().merge(unfold(out_1), unfold(lse_1), out_2, lse_2)
    over = backward(fold(grad_out), fold(query), key_P, value_P, fold(out), fold(lse), False)
    own = backward(grad_out, query, key, value, out, lse, True)
    results = (of_prefix[0], of_prefix[1] + over[1], of_prefix[2] + over[2], unfold(over[0]) + own[0], *own[1:])
    return [x.to(query.dtype) for x in results]


def ours(size: Size, prefix: Inputs, responses: Inputs) -> list[Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return operators().attend(query, key, value, size.scale, causal)

    def backward(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return operators().attend_backward(grad_out, query, key, value, out, lse, size.scale, causal)

    query, key, value, grad_out = prefix
    of_prefix = backward(grad_out, query, key, value, *attend(query, key, value, True), True)
    return parts(size, prefix, responses, attend, backward, list(of_prefix))


def torch_parts(size: Size, prefix: Inputs, responses: Inputs) -> list[Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        query, key, value = query.float(), key.float(), value.float()
        if causal:
            return flash(query, key, value, 0.0, causal, scale=size.scale)
        folded = query.unflatten(1, (size.Hkv, -1)).flatten(2, 3)
        out, lse = flash(folded, key, value, 0.0, causal, scale=size.scale)
        return out.reshape(query.shape), lse.reshape(query.shape[:3])

    def backward(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = [x.float() for x in (grad_out, query, key, value)]
        return flash_backward(*inputs, out, lse, 0.0, causal, scale=size.scale)

    return parts(size, prefix, responses, attend, backward, causal_gradients(prefix))


def decode_steps(size: Size, prefix: Inputs, dtype: str) -> dict[str, Step]:
    """A token of each of G responses over the prefix, and over a copy of the prefix for each of them."""
    from opsdl.prefix.attention.states import prefix_decode

    query_G = torch.randn(size.G, size.Hq, 1, size.D).to(getattr(torch, dtype))
    _, key, value, _ = prefix
    key_G, value_G = (x.repeat(size.G, 1, 1, 1) for x in (key, value))
    key_L, value_L = (x[0].transpose(0, 1) for x in (key, value))
    return {
        "ours": lambda: prefix_decode(query_G[:, :, 0], key_L, value_L, size.scale, length=size.P),
        "SDPA over repeated keys": lambda: sdpa(query_G, key_G, value_G, enable_gqa=True),
    }


def report(result: Result) -> Report:
    size = result.settings
    rows = [
        [case.of["what"], case.of["dtype"], case.label, fixed(case.value("time")), fixed(case.value("ratio"))]
        for case in result.cases
    ]
    table = Table(["what", "dtype", "way", "ms", "ours is faster by"], rows)
    return Report(
        f"""\
# Attention over a shared prefix

G = {size["G"]} responses of T = {size["T"]} tokens over a prefix of P = {size["P"]}, Hq = {size["Hq"]},
Hkv = {size["Hkv"]}, D = {size["D"]}; medians of {size["rounds"]} rounds in which the ways take turns.

{origin(result)}

{table.markdown()}
""",
        {"attention": table},
    )


if __name__ == "__main__":
    main()
