"""What `skip_tolerance` saves on real hidden states: student under the long context, teacher under the short one.

    python -m bench.skipping recipes/smollm2-kjv.yaml             # into bench/results/skipping.{json,md}
    python -m bench.skipping --quick --out DIR                    # random hidden states

Rolls out needle questions of the recipe with its model, takes both models' hidden states at every response token in
bf16, and measures the loss on them: errors against float64, time of the backward, and how the gradient is spread over
tokens and tiles.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import opsdl
from bench import harness
from bench.harness import Say, Step
from bench.inputs import Inputs, Shape, make_inputs, relative_error, truth_in_parts
from bench.results import Case, Number, Result, measured, origin, publish
from bench.tables import Report, Table, fixed, message, percent, scientific

NAME = "skipping"
PROMPTS, RESPONSES = 24, 4
TOLERANCES: tuple[float | str | None, ...] = (None, "auto", 5e-4, 2e-3, 1e-2)
TILES = ((1, 128), (1, 1024), (16, 128), (64, 128), (128, 128))  # tokens x vocabulary entries
ORDERS = ("as they come", "tokens sorted")
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
IDLE_ENERGY = 9e-6  # (0.3 %)^2 of the gradient's energy may be left out


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(NAME, __doc__)
    parser.add_argument("recipe", nargs="?", help="the YAML file of a run; none with --quick")
    options = harness.parse(parser, arguments)
    if not options.recipe and not options.quick:
        parser.error("which recipe? for example recipes/smollm2-kjv.yaml")
    say = harness.speaker(NAME)
    inputs = hidden_states(options.recipe) if options.recipe else make_inputs(Shape(48, 64, 1000), "bfloat16", 0.06)
    say(f"float64 gradients of {len(inputs.hidden_NH)} tokens")
    kls, grads = zip(*((kl_n, grad_nV) for _, kl_n, grad_nV in truth_in_parts(inputs)), strict=True)
    kl_N, grad_NV = torch.cat(kls), torch.cat(grads)
    cases = [*tolerances(inputs, grad_NV, say), quantiles(kl_N), *tiles(grad_NV)]
    settings = {
        "rounds": harness.ROUNDS, "source": options.recipe or "random hidden states",
        "tokens": len(inputs.hidden_NH), "vocabulary": len(inputs.weight_VH),
    }  # fmt: skip
    result = measured(NAME, options.command, settings, cases)
    publish(result, report(result), options.out)


def hidden_states(recipe: str) -> Inputs:
    """Hidden states of every response token in bf16: the student's and the teacher's, which have the same head."""
    from opsdl.models import eos_token_ids, load_model, load_tokenizer
    from opsdl.training.recipe import load_recipe
    from opsdl.training.run import make_prompts

    config = load_recipe(recipe)
    source = config.model.name, config.model.gguf_file
    tokenizer, model = load_tokenizer(*source), load_model(*source)
    prompts = make_prompts(config, tokenizer, model)
    long: list[Tensor] = []
    short: list[Tensor] = []
    tokens: list[Tensor] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for index in range(PROMPTS):
            prompt = prompts[index]
            group = opsdl.generate(
                model, opsdl.prefill(model, prompt.long_ids), num_responses=RESPONSES, max_new_tokens=20,
                temperature=0.8, eos_token_id=eos_token_ids(model, tokenizer),
                generator=torch.Generator().manual_seed(index),
            )  # fmt: skip
            tokens.append(group.tokens[group.mask])
            for found, ids in ((long, prompt.long_ids), (short, prompt.short_ids)):
                found.append(opsdl.response_hidden(model, ids, group)[group.mask].bfloat16())
    weight_VH = model.get_output_embeddings().weight.detach().bfloat16()
    return Inputs(torch.cat(long), weight_VH, torch.cat(short), torch.cat(tokens))


def tolerances(inputs: Inputs, grad_NV: Tensor, say: Say) -> list[Case]:
    """For each tolerance the share that is skipped, the errors, and the time of the backward.

    A backward's time is that of both passes less that of the forward alone in the same round.
    """
    expected = {"hidden": grad_NV @ inputs.weight_VH.double(), "head": grad_NV.T @ inputs.hidden_NH.double()}
    steps: dict[str, Step] = {"forward": partial(forward, inputs)}
    steps |= {str(tolerance): partial(both_passes, inputs, tolerance) for tolerance in TOLERANCES}
    times = harness.time_in_turn(steps, say=say)
    backward = {name: [x - y for x, y in zip(rounds, times["forward"], strict=True)] for name, rounds in times.items()}
    cases = []
    for tolerance in TOLERANCES:
        name = str(tolerance)
        skipped, *gradients = both_passes(inputs, tolerance)
        numbers = {
            "skipped": Number(skipped, "1"),
            "backward": Number.timed(backward[name], "ms"),
            "ratio": Number.ratio(backward[name], backward["None"]),
        }
        for (what, truth), gradient in zip(expected.items(), gradients, strict=True):
            numbers[f"{what}_error"] = Number(relative_error(gradient, truth), "1")
        cases.append(Case(name, name, {"what": "tolerance"}, numbers))
    return cases


def forward(inputs: Inputs) -> Tensor:
    x = inputs.leaves()
    with torch.no_grad():
        return opsdl.fused_reverse_kl(x.hidden_NH, x.weight_VH, x.teacher_NH)


def both_passes(inputs: Inputs, tolerance: float | str | None) -> tuple[float, Tensor, Tensor]:
    """The share of the products of a token and a tile that is skipped, and the gradients."""
    x = inputs.leaves()
    loss, stats = opsdl.fused_reverse_kl(
        x.hidden_NH, x.weight_VH, x.teacher_NH, skip_tolerance=tolerance, return_stats=True
    )
    grad_hidden_NH, grad_weight_VH = torch.autograd.grad(loss, (x.hidden_NH, x.weight_VH))
    return (float(stats["skipped"].mean()) if tolerance else 0.0), grad_hidden_NH, grad_weight_VH


def quantiles(kl_N: Tensor) -> Case:
    ordered = kl_N.sort().values
    numbers = {f"{q:.0%}": Number(float(ordered[int(q * (len(ordered) - 1))]), "nats") for q in QUANTILES}
    return Case("kl", "KL of the tokens", {"what": "quantiles"}, numbers)


def tiles(grad_NV: Tensor) -> list[Case]:
    """The share of tiles that hold all of the energy of the gradient for the logits but IDLE_ENERGY."""
    ordered_NV = grad_NV[grad_NV.square().sum(-1).argsort()]
    cases = []
    for tokens, entries in TILES:
        for order, g in zip(ORDERS, (grad_NV, ordered_NV), strict=True):
            padded = torch.nn.functional.pad(g, (0, -g.shape[1] % entries, 0, -g.shape[0] % tokens)).square_()
            energy = padded.view(padded.shape[0] // tokens, tokens, -1, entries).sum((1, 3)).flatten().sort().values
            idle = (energy.cumsum(0) <= IDLE_ENERGY * energy.sum()).double().mean()
            name = f"{tokens} x {entries}"
            cases.append(Case(name, name, {"what": "tiles", "order": order}, {"needed": Number(1 - float(idle), "1")}))
    return cases


def report(result: Result) -> Report:
    settings = result.settings
    rows = [
        [
            case.label, percent(case.value("skipped")), fixed(case.value("ratio")),
            percent(case.value("hidden_error"), 2), percent(case.value("head_error"), 2),
        ]
        for case in result.select(what="tolerance")
    ]  # fmt: skip
    header = ["skip_tolerance", "skipped", "backward, exact = 1", "dHidden error", "dHead error"]
    skipping = Table(header, rows)
    kl = result.only("kl")
    quantiles = Table(["quantile", "KL of a token"], [[q, scientific(x.value)] for q, x in kl.numbers.items()])
    needed = [
        [name, *(percent(result.only(name, what="tiles", order=order).value("needed")) for order in ORDERS)]
        for name in dict.fromkeys(case.name for case in result.select(what="tiles"))
    ]
    text = f"""\
# Skipping on real hidden states

{settings["tokens"]} response tokens of {message(settings["source"])}, V = {settings["vocabulary"]}, bf16, medians of
{settings["rounds"]} rounds. Skipped: share of the products of a token and a tile of 256 entries. Errors are relative,
against float64.

{origin(result)}

{skipping.markdown()}

{quantiles.markdown()}

Tiles of logits that hold all but (0.3 %)^2 of the energy of the gradient for the logits:

{Table(["tile, tokens x entries", *ORDERS], needed).markdown()}
"""
    return Report(text, {"skipping": skipping})


if __name__ == "__main__":
    main()
