"""The compared cases: one step is forward plus backward to dHidden and dHead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import opsdl
from bench import peers
from bench.inputs import Inputs, Result

Step = Callable[[Inputs], Result]

# "auto" is the best that the machine has, "torch" what every machine has.
OUR_BACKENDS = ("auto", "torch")


@dataclass(frozen=True)
class Case:
    label: str  # in tables and picture
    kind: str  # "products", "reverse KL" or "cross-entropy": only the same kind is compared
    make: Callable[[], Step]  # ImportError when the peer is not installed


def products(x: Inputs) -> Result:
    """The four matrix products that any form needs, and nothing else: the fair bar."""
    logits_NV = x.hidden_NH @ x.weight_VH.T
    x.teacher_NH @ x.weight_VH.T
    return Result(None, logits_NV @ x.weight_VH, logits_NV.T @ x.hidden_NH)


def ours(backend: str, skip_tolerance: str | None = None) -> peers.Loss:
    return lambda x: opsdl.fused_reverse_kl(
        x.hidden_NH, x.weight_VH, x.teacher_NH, backend=backend, skip_tolerance=skip_tolerance
    )


def our_cross_entropy() -> peers.Loss:
    return lambda x: -opsdl.fused_log_prob(x.hidden_NH, x.weight_VH, x.tokens_N, reduction="mean")


def step_of(make_loss: Callable[[], peers.Loss]) -> Step:
    loss_of = make_loss()

    def step(inputs: Inputs) -> Result:
        x = inputs.leaves()
        loss = loss_of(x)
        return Result(loss.detach(), *torch.autograd.grad(loss, (x.hidden_NH, x.weight_VH)))

    return step


def _case(label: str, make_loss: Callable[[], peers.Loss], kind: str = "reverse KL") -> Case:
    return Case(label, kind, partial(step_of, make_loss))


CASES = {
    "products": Case("bare products (4 matmuls)", "products", lambda: products),
    **{f"opsdl-{name}": _case(f'opsdl, backend "{name}"', partial(ours, name)) for name in OUR_BACKENDS},
    "opsdl-skip": _case('opsdl, backend "auto", skip "auto"', partial(ours, "auto", "auto")),
    "plain": _case("plain formula", peers.plain),
    "plain-compiled": _case("plain formula, torch.compile", peers.plain_compiled),
    "liger-eager": _case("Liger 0.8.5, eager", peers.liger_eager),
    "liger-compiled": _case("Liger 0.8.5, compiled", peers.liger_compiled),
    "trl-default": _case("TRL 1.16, default tiles", peers.trl_default),
    "trl-small": _case("TRL 1.16, tiles 1024 x 4096", peers.trl_small_tiles),
    "opsdl-ce": _case("cross-entropy: opsdl", our_cross_entropy, "cross-entropy"),
    "cce": _case("cross-entropy: CCE 25.1.1, torch_compile", peers.cut_cross_entropy, "cross-entropy"),
}
