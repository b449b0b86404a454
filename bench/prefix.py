"""A whole model with and without a shared prefix: student, rollout, memory. A quarter of an hour on 2 CPU cores.

    python -m bench.prefix .cache/smollm2 SmolLM2-135M-Instruct.Q4_1.gguf      # writes bench/results/prefix.md

G responses of T tokens to one prefix of P tokens, float32 weights under bfloat16 autocast, as the recipes train. The
student's step is the forward and backward of the transformer, without the loss, which is the same on both sides; its
ideal is what the counts of tokens alone give, G (P + T) / (P + G T). Rollouts include each side's prefill.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import opsdl
from bench.memory import resident
from opsdl.config import ModelConfig
from opsdl.models import load_model

G, P, T = 8, 2048, 64
ROUNDS = 5
RESULTS = Path(__file__).parent / "results" / "prefix.md"


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def responses(vocabulary: int) -> tuple[Tensor, opsdl.Responses]:
    generator = torch.Generator().manual_seed(0)
    prefix_P = torch.randint(vocabulary, (P,), generator=generator)
    tokens_GT = torch.randint(vocabulary, (G, T), generator=generator)
    return prefix_P, opsdl.Responses(tokens_GT, torch.ones(G, T, dtype=torch.bool))


def packed_step(model, prefix_P: Tensor, group: opsdl.Responses, mode: str = "exact") -> Tensor:
    with autocast():
        hidden_GTH = opsdl.response_hidden(model, prefix_P, group, prefix_gradient=mode)
    hidden_GTH.float().square().mean().backward()
    return hidden_GTH.detach()


def separate_step(model, prefix_P: Tensor, group: opsdl.Responses) -> Tensor:
    """Rows of prefix and response, one after another: all of them with their activations would not fit in memory."""
    opsdl.prefix.detach(model)
    tokens = torch.cat([prefix_P.expand(G, -1), group.tokens[:, :-1]], 1)
    hiddens = []
    for rows in tokens.split(1):
        with autocast():
            hidden = model.base_model(rows, use_cache=False).last_hidden_state[:, P - 1 :]
        (hidden.float().square().mean() / G).backward()
        hiddens.append(hidden.detach())
    return torch.cat(hiddens)


def our_rollout(model, prefix_P: Tensor) -> Tensor:
    with torch.no_grad(), autocast():
        prefix = opsdl.prefill(model, prefix_P)
        out = opsdl.generate(model, prefix, num_responses=G, max_new_tokens=T, eos_token_id=len(model.lm_head.weight))
    return out.tokens


def their_rollout(model, prefix_P: Tensor) -> Tensor:
    opsdl.prefix.detach(model)
    with torch.no_grad(), autocast():
        return model.generate(
            prefix_P[None], attention_mask=torch.ones(1, P, dtype=torch.int64), do_sample=True, num_return_sequences=G,
            max_new_tokens=T, min_new_tokens=T, pad_token_id=0,
        )[:, P:]  # fmt: skip


def seconds(ways: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
    """Of each way in every round; a first round that does not count warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(ROUNDS + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
            print(f"round {index} of {ROUNDS}: {name} {found[name][-1]:.1f} s", file=sys.stderr, flush=True)
    return {name: times[1:] for name, times in found.items()}


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_bytes(model, way: str, rows: int) -> int:
    """Peak above the loaded model of one step, in this process."""
    prefix_P, group = responses(model.config.vocab_size)
    group = opsdl.Responses(group.tokens[:rows], group.mask[:rows])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    if way == "separate":
        opsdl.prefix.detach(model)
        with autocast():
            tokens = torch.cat([prefix_P.expand(rows, -1), group.tokens[:, :-1]], 1)
            hidden = model.base_model(tokens, use_cache=False).last_hidden_state[:, P - 1 :]
        hidden.float().square().mean().backward()
    else:
        packed_step(model, prefix_P, group, way)
    return resident("VmHWM") - before


def of_child(source: list[str], way: str, rows: int) -> int:
    command = [sys.executable, "-m", "bench.prefix", *source, way, str(rows)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"memory: {way}, {rows} rows: {child.stdout.strip()}", file=sys.stderr, flush=True)
    return json.loads(child.stdout)


def held(model, prefix_P: Tensor) -> tuple[float, float]:
    """Keys and values of G rows at their full length, as a multiple of one row's and of all distinct tokens'."""
    pool = opsdl.KeyValuePool(4 << 30)
    with torch.no_grad(), autocast():
        prefix = opsdl.prefill(model, prefix_P, pool=pool)
        token = prefix.nbytes / (P - 1)
        rows = [pool.fork(prefix.sequence) for _ in range(G)]
        pool.extend(rows, T)
    return pool.held_bytes / (token * (P - 1 + T)), pool.held_bytes / (token * (P - 1 + G * T))


def main(name: str, gguf_file: str | None = None, way: str | None = None, rows: str = "0") -> None:
    torch.set_num_threads(2)
    model = load_model(ModelConfig(name=name, gguf_file=gguf_file))
    if way:
        print(peak_bytes(model, way, int(rows)))
        return
    prefix_P, group = responses(model.config.vocab_size)
    steps = {
        "packed": lambda: packed_step(model, prefix_P, group),
        "detached": lambda: packed_step(model, prefix_P, group, "detached"),
        "separate": lambda: separate_step(model, prefix_P, group),
    }
    difference = (steps["packed"]().float() - steps["separate"]().float()).norm() / steps["packed"]().float().norm()
    student = seconds(steps)
    rollout = seconds({"ours": lambda: our_rollout(model, prefix_P), "theirs": lambda: their_rollout(model, prefix_P)})
    ideal, speed = G * (P + T) / (P + G * T), ratio(student["separate"], student["packed"])
    source = [name, gguf_file]
    packed, detached = of_child(source, "exact", G), of_child(source, "detached", G)
    one, two = of_child(source, "separate", 1), of_child(source, "separate", 2)
    eight = one + (G - 1) * (two - one)
    of_row, of_tokens = held(model, prefix_P)
    median = {key: statistics.median(times) for key, times in (student | rollout).items()}
    RESULTS.write_text(f"""\
# A whole model over a shared prefix

`python -m bench.prefix`: {Path(name).name}, {model.num_parameters() / 1e6:.0f} million parameters, P = {P}, G = {G},
T = {T}, bfloat16 autocast, 2 threads, medians of {ROUNDS} rounds side by side.

| | shared prefix | G rows | ratio |
|---|---|---|---|
| student, forward and backward, exact | {median["packed"]:.1f} s | {median["separate"]:.1f} s | {speed:.2f}, \
{speed / ideal:.2f} of the ideal {ideal:.2f} |
| student, prefix detached (with its prefill) | {median["detached"]:.1f} s | {median["separate"]:.1f} s | \
{ratio(student["separate"], student["detached"]):.2f} |
| rollout, beside transformers' `generate(num_return_sequences={G})` | {median["ours"]:.1f} s | \
{median["theirs"]:.1f} s | {ratio(rollout["theirs"], rollout["ours"]):.2f} |
| peak memory of the student's step, exact | {packed / 2**20:.0f} MiB | {eight / 2**20:.0f} MiB | \
{packed / eight:.3f} |
| peak memory, prefix detached | {detached / 2**20:.0f} MiB | {eight / 2**20:.0f} MiB | {detached / eight:.3f} |

G rows at once would take more memory than this machine has: theirs is that of one row, {one / 2**20:.0f} MiB, and \
{G - 1} times what a second one adds, {(two - one) / 2**20:.0f} MiB; in time they run one after another.
Hidden states of the two differ by {difference:.1e} (bfloat16 rounds at 4e-3).
Keys and values of all {G} rows at their full length, in blocks of 16: {of_row:.2f} times those of one row, \
{of_tokens:.3f} times those of all distinct tokens; before the rows' first token, those of the prefix alone.
""")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
