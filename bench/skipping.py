"""What `skip_tolerance` saves on real hidden states: student under the long context, teacher under the short one.

    python -m bench.skipping recipes/smollm2-kjv.yaml             # writes bench/results/skipping.json and .md

Rolls out needle questions of the recipe with its model, takes both models' hidden states at every response token in
bf16, and measures the loss on them: errors against float64, time of the backward, and how the gradient is spread over
tokens and tiles.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import opsdl
from opsdl.config import load_config
from opsdl.data.prompts import Prompts
from opsdl.losses import moments
from opsdl.models import eos_token_ids, load_model, load_tokenizer

PROMPTS, RESPONSES, ROUNDS = 24, 4, 5
TOLERANCES = (None, "auto", 5e-4, 2e-3, 1e-2)
TILES = ((1, 128), (1, 1024), (16, 128), (64, 128), (128, 128))  # tokens x vocabulary entries
OUT = Path(__file__).parent / "results"


def hidden_states(path: str) -> tuple[Tensor, Tensor, Tensor]:
    """(student [N, H], teacher [N, H], head [V, H]) in bf16, of every response token."""
    config = load_config(path, [])
    tokenizer, model = load_tokenizer(config.model), load_model(config.model, torch.device("cpu"))
    prompts = Prompts(config, tokenizer, None, torch.device("cpu"))
    pairs: list[list[Tensor]] = [[], []]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for index in range(PROMPTS):
            prompt = prompts[index]
            group = opsdl.generate(
                model, opsdl.prefill(model, prompt.long_ids), num_responses=RESPONSES, max_new_tokens=20,
                temperature=0.8, eos_token_id=eos_token_ids(model, tokenizer),
                generator=torch.Generator().manual_seed(index),
            )  # fmt: skip
            for found, ids in zip(pairs, (prompt.long_ids, prompt.short_ids), strict=True):
                found.append(opsdl.response_hidden(model, ids, group)[group.mask].bfloat16())
    return torch.cat(pairs[0]), torch.cat(pairs[1]), model.get_output_embeddings().weight.detach().bfloat16()


def measure(student_NH: Tensor, teacher_NH: Tensor, weight_VH: Tensor, tolerance) -> dict:
    """Share of tokens skipped, gradients, and seconds of the backward: both passes less the forward alone."""
    seconds = []
    for _ in range(ROUNDS + 1):
        h, w = student_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
        start = time.perf_counter()
        with torch.no_grad():
            opsdl.fused_reverse_kl(h, w, teacher_NH)
        middle = time.perf_counter()
        loss, stats = opsdl.fused_reverse_kl(h, w, teacher_NH, skip_tolerance=tolerance, return_stats=True)
        loss.backward()
        seconds.append(time.perf_counter() - middle - (middle - start))
    skipped = stats["skipped"].mean().item() if tolerance else 0.0
    return {"skipped": skipped, "seconds": statistics.median(seconds[1:]), "hidden": h.grad, "weight": w.grad}


def spread(student_NH: Tensor, teacher_NH: Tensor, weight_VH: Tensor) -> tuple[dict, dict]:
    """float64 gradients of the mean KL, and the share of tiles that hold all but (0.3 %)^2 of its energy in logits."""
    h, w = student_NH.double(), weight_VH.double()
    z, gap = h @ w.T, (h - teacher_NH.double()) @ w.T
    stats = moments.statistics(moments.merge(moments.measure(z, gap)[:, None]))
    grad = (z - stats["student_lse"][:, None]).exp_().mul_(gap - stats["mean_gap"][:, None]) / len(h)
    order = grad.square().sum(-1).argsort()
    needed = {}
    for rows, columns in TILES:
        for name, g in (("as they come", grad), ("tokens sorted", grad[order])):
            padded = torch.nn.functional.pad(g, (0, -g.shape[1] % columns, 0, -g.shape[0] % rows)).square_()
            energy = padded.view(padded.shape[0] // rows, rows, -1, columns).sum((1, 3)).flatten().sort().values
            idle = (energy.cumsum(0) <= 9e-6 * energy.sum()).float().mean().item()
            needed[f"{rows} x {columns}, {name}"] = 1 - idle
    kl = stats["kl"].sort().values
    quantiles = {str(q): float(kl[int(q * (len(kl) - 1))]) for q in (0.1, 0.25, 0.5, 0.75, 0.9)}
    return {"hidden": grad @ w, "weight": grad.T @ h}, {"tiles needed": needed, "kl quantiles": quantiles}


def main(path: str) -> None:
    torch.set_num_threads(2)
    student_NH, teacher_NH, weight_VH = hidden_states(path)
    truth, facts = spread(student_NH, teacher_NH, weight_VH)
    rows = []
    for tolerance in TOLERANCES:
        row = measure(student_NH, teacher_NH, weight_VH, tolerance)
        for name in truth:
            row[name] = float((row[name].double() - truth[name]).norm() / truth[name].norm())
        rows.append(
            {
                "tolerance": tolerance,
                **row,
                "speedup": (rows[0]["seconds"] if rows else row["seconds"]) / row["seconds"],
            }
        )
        print(rows[-1], flush=True)
    facts |= {"tokens": len(student_NH), "vocabulary": len(weight_VH), "rows": rows}
    OUT.mkdir(exist_ok=True)
    (OUT / "skipping.json").write_text(json.dumps(facts, indent=1) + "\n")
    (OUT / "skipping.md").write_text(report(facts))


def report(facts: dict) -> str:
    lines = [
        "# Skipping on real hidden states",
        "",
        f"{facts['tokens']} response tokens of SmolLM2-135M under needle questions of 1000 tokens, V ="
        f" {facts['vocabulary']}, bf16, 2 threads. Skipped: share of the products of a token and a tile of 256 entries."
        " Errors are relative, against float64.",
        "",
        "| skip_tolerance | skipped | backward, exact = 1 | dH error | dW error |",
        "|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        lines.append(
            f"| {row['tolerance']} | {row['skipped']:.1%} | {1 / row['speedup']:.2f} | {row['hidden']:.2%} |"
            f" {row['weight']:.2%} |"
        )
    quantiles = ", ".join(f"{float(q):.0%}: {kl:.1e}" for q, kl in facts["kl quantiles"].items())
    lines += ["", f"Quantiles of the tokens' KL: {quantiles}.", ""]
    lines += ["Tiles of logits that hold all but (0.3 %)^2 of the energy of the gradient for the logits:", ""]
    lines += ["| tile, tokens x entries | needed |", "|---|---|"]
    lines += [f"| {name} | {share:.1%} |" for name, share in facts["tiles needed"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1])
