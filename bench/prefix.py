"""A whole model with and without a shared prefix: student, rollout, memory. A quarter of an hour on 2 CPU cores.

    python -m bench.prefix .cache/smollm2 SmolLM2-135M-Instruct.Q4_1.gguf      # into bench/results/prefix.{json,md}
    python -m bench.prefix --quick --out DIR                                   # a tiny random model

G responses of T tokens to one prefix of P tokens, float32 weights under bfloat16 autocast, as the recipes train. The
student's step is the forward and backward of the transformer, without the loss, which is the same on both sides; its
ideal is what the counts of tokens alone give, G (P + T) / (P + G T). Rollouts include each side's prefill.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import opsdl
from bench import harness, prefix_report
from bench.harness import Say, Step
from bench.memory import peak_in_child
from bench.results import Case, Number, measured, publish

NAME = "prefix"


@dataclass(frozen=True)
class Size:
    G: int = 8
    P: int = 2048
    T: int = 64


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(NAME, __doc__)
    parser.add_argument("model", nargs="?", help="a folder, or a name on the hub; none with --quick")
    parser.add_argument("gguf", nargs="?", help="the GGUF file in it")
    options = harness.parse(parser, arguments)
    if not options.model and not options.quick:
        parser.error("which model? for example .cache/smollm2 SmolLM2-135M-Instruct.Q4_1.gguf")
    size = Size(G=3, P=24, T=6) if options.quick else Size()
    model, say = load(options.model, options.gguf), harness.speaker(NAME)
    cases = [*student(model, size, say), *rollouts(model, size, say), pool(model, size)]
    if not options.quick:
        cases += peaks(options.model, options.gguf, size, say)
    settings = {
        "model": Path(options.model or "random").name, "parameters": model.num_parameters(),
        "rounds": harness.ROUNDS, **asdict(size),
    }  # fmt: skip
    result = measured(NAME, options.command, settings, cases)
    publish(result, prefix_report.report(result), options.out)


def load(name: str | None, gguf: str | None) -> Any:
    """The model of that name; without one a random Llama of two small layers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, gguf_file=gguf, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def group_of(vocabulary: int, size: Size) -> tuple[Tensor, opsdl.Responses]:
    generator = torch.Generator().manual_seed(0)
    prefix_P = torch.randint(vocabulary, (size.P,), generator=generator)
    tokens_GT = torch.randint(vocabulary, (size.G, size.T), generator=generator)
    return prefix_P, opsdl.Responses(tokens_GT, torch.ones(size.G, size.T, dtype=torch.bool))


def student(model: Any, size: Size, say: Say) -> list[Case]:
    """The student's step over the shared prefix, exact and detached, and over separate sequences."""
    prefix_P, group = group_of(model.config.vocab_size, size)
    steps: dict[str, Step] = {
        "exact": lambda: packed_step(model, prefix_P, group, "exact"),
        "detached": lambda: packed_step(model, prefix_P, group, "detached"),
        "separate": lambda: separate_step(model, prefix_P, group),
    }
    exact = packed_step(model, prefix_P, group, "exact").float()
    difference = (exact - separate_step(model, prefix_P, group).float()).norm() / exact.norm()
    cases = timed_cases("student", harness.time_in_turn(steps, say=say), bar="separate")
    cases[0].numbers["difference"] = Number(float(difference), "1")
    return cases


def packed_step(model: Any, prefix_P: Tensor, group: opsdl.Responses, mode: str) -> Tensor:
    with autocast():
        hidden_GTH = opsdl.response_hidden(model, prefix_P, group, prefix_gradient=mode)
    hidden_GTH.float().square().mean().backward()
    return hidden_GTH.detach()


def separate_step(model: Any, prefix_P: Tensor, group: opsdl.Responses, at_once: int = 1) -> Tensor:
    """Sequences of prefix and response, one after another: all with their activations would not fit in memory."""
    opsdl.prefix.detach(model)
    count = len(group.tokens)
    tokens_GL = torch.cat([prefix_P.expand(count, -1), group.tokens[:, :-1]], 1)
    hiddens = []
    for some_gL in tokens_GL.split(at_once):
        with autocast():
            hidden_gTH = model.base_model(some_gL, use_cache=False).last_hidden_state[:, len(prefix_P) - 1 :]
        (hidden_gTH.float().square().mean() * len(some_gL) / count).backward()
        hiddens.append(hidden_gTH.detach())
    return torch.cat(hiddens)


def rollouts(model: Any, size: Size, say: Say) -> list[Case]:
    prefix_P, _ = group_of(model.config.vocab_size, size)
    steps: dict[str, Step] = {
        "ours": lambda: our_rollout(model, prefix_P, size),
        "transformers": lambda: their_rollout(model, prefix_P, size),
    }
    return timed_cases("rollout", harness.time_in_turn(steps, say=say), bar="transformers")


def our_rollout(model: Any, prefix_P: Tensor, size: Size) -> Tensor:
    with torch.no_grad(), autocast():
        prefix = opsdl.prefill(model, prefix_P)
        never = model.config.vocab_size  # no token ends a response
        out = opsdl.generate(model, prefix, num_responses=size.G, max_new_tokens=size.T, eos_token_id=never)
    return out.tokens


def their_rollout(model: Any, prefix_P: Tensor, size: Size) -> Tensor:
    opsdl.prefix.detach(model)
    with torch.no_grad(), autocast():
        return model.generate(
            prefix_P[None], attention_mask=torch.ones(1, size.P, dtype=torch.int64), do_sample=True,
            num_return_sequences=size.G, max_new_tokens=size.T, min_new_tokens=size.T, pad_token_id=0,
        )[:, size.P :]  # fmt: skip


def timed_cases(what: str, times: dict[str, list[float]], bar: str) -> list[Case]:
    """Seconds, and how many times faster than `bar` each is."""
    return [
        Case(
            name, name, {"what": what},
            {"time": Number.timed([x / 1e3 for x in rounds], "s"), "speedup": Number.ratio(times[bar], rounds)},
        )
        for name, rounds in times.items()
    ]  # fmt: skip


def pool(model: Any, size: Size) -> Case:
    """Keys and values of G responses at their full length, in blocks of a pool."""
    prefix_P, _ = group_of(model.config.vocab_size, size)
    blocks = opsdl.KeyValuePool(4 << 30)
    with torch.no_grad(), autocast():
        prefix = opsdl.prefill(model, prefix_P, pool=blocks)
        token = prefix.nbytes / (size.P - 1)
        blocks.extend([blocks.fork(prefix.parts[0].sequence) for _ in range(size.G)], size.T)
    held = blocks.held_bytes / token
    numbers = {
        "of one sequence": Number(held / (size.P - 1 + size.T), "1"),
        "of distinct tokens": Number(held / (size.P - 1 + size.G * size.T), "1"),
    }
    return Case("pool", "keys and values in a pool", {"what": "pool"}, numbers)


def peaks(name: str, gguf: str | None, size: Size, say: Say) -> list[Case]:
    """Peak memory of the student's step above the loaded model and its gradients.

    G separate sequences at once would take more memory than a small machine has: theirs is that of one, and G - 1
    times what a second one adds.
    """

    def peak(way: str, count: int) -> int | None:
        say(f"memory: {way}, {count} sequences")
        return peak_in_child(memory_step, name, gguf, size.P, size.T, count, way, warm_up=0)

    found = {"exact": peak("exact", size.G), "detached": peak("detached", size.G)}
    first, both = peak("separate", 1), peak("separate", 2)
    if first is not None and both is not None:
        second = both - first
        found |= {"separate": first + (size.G - 1) * second, "first": first, "second": second}
    return [
        Case(way, way, {"what": "memory"}, {"peak": Number(bytes_, "bytes")})
        for way, bytes_ in found.items()
        if bytes_ is not None
    ]


def memory_step(name: str, gguf: str | None, p: int, t: int, count: int, way: str) -> Step:
    """A student's step of `count` responses, for a process that measures its memory."""
    model = load(name, gguf)
    prefix_P, group = group_of(model.config.vocab_size, Size(count, p, t))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if way == "separate":
        return lambda: separate_step(model, prefix_P, group, at_once=count)
    return lambda: packed_step(model, prefix_P, group, way)


if __name__ == "__main__":
    main()
