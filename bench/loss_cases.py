"""What bench.loss compares: one step is forward plus backward to dHidden and dHead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import opsdl
from bench import peers
from bench.harness import Step
from bench.inputs import Inputs, LossAndGradients, Shape, make_inputs

Differentiate = Callable[[Inputs], LossAndGradients]

# "auto" is the best that the machine has, "torch" what every machine has.
OUR_BACKENDS = ("auto", "torch")
TIMED_NOISE = 0.06  # KL about 1e-2; no way but "skip" depends on it


@dataclass(frozen=True)
class Way:
    label: str  # in tables and picture
    kind: str  # "products", "reverse KL" or "cross-entropy": only the same kind is compared
    make: Callable[[], Differentiate]  # ImportError when the peer is not installed


def products(x: Inputs) -> LossAndGradients:
    """The four matrix products that any form needs, and nothing else: the fair bar."""
    logits_NV = x.hidden_NH @ x.weight_VH.T
    x.teacher_NH @ x.weight_VH.T
    return LossAndGradients(torch.tensor(torch.nan), logits_NV @ x.weight_VH, logits_NV.T @ x.hidden_NH)


def ours(backend: str, skip_tolerance: str | None = None) -> peers.Loss:
    return lambda x: opsdl.fused_reverse_kl(
        x.hidden_NH, x.weight_VH, x.teacher_NH, backend=backend, skip_tolerance=skip_tolerance
    )


def our_cross_entropy() -> peers.Loss:
    return lambda x: -opsdl.fused_log_prob(x.hidden_NH, x.weight_VH, x.tokens_N, reduction="mean")


def differentiated(make_loss: Callable[[], peers.Loss]) -> Differentiate:
    loss_of = make_loss()

    def differentiate(inputs: Inputs) -> LossAndGradients:
        x = inputs.leaves()
        loss = loss_of(x)
        return LossAndGradients(loss.detach(), *torch.autograd.grad(loss, (x.hidden_NH, x.weight_VH)))

    return differentiate


def step_of(name: str, n: int, h: int, v: int, dtype: str) -> Step:
    """A step of one way, for a process that measures its memory."""
    differentiate, inputs = WAYS[name].make(), make_inputs(Shape(n, h, v), dtype, TIMED_NOISE)
    return lambda: differentiate(inputs)


def _way(label: str, make_loss: Callable[[], peers.Loss], kind: str = "reverse KL") -> Way:
    return Way(label, kind, partial(differentiated, make_loss))


WAYS = {
    "products": Way("bare products (4 matmuls)", "products", lambda: products),
    **{f"opsdl-{name}": _way(f'opsdl, backend "{name}"', partial(ours, name)) for name in OUR_BACKENDS},
    "opsdl-skip": _way('opsdl, backend "auto", skip "auto"', partial(ours, "auto", "auto")),
    "plain": _way("plain formula", peers.plain),
    "plain-compiled": _way("plain formula, torch.compile", peers.plain_compiled),
    "liger-eager": _way("Liger 0.8.5, eager", peers.liger_eager),
    "liger-compiled": _way("Liger 0.8.5, compiled", peers.liger_compiled),
    "trl-default": _way("TRL 1.16, default tiles", peers.trl_default),
    "trl-small": _way("TRL 1.16, tiles 1024 x 4096", peers.trl_small_tiles),
    "opsdl-ce": _way("cross-entropy: opsdl", our_cross_entropy, "cross-entropy"),
    "cce": _way("cross-entropy: CCE 25.1.1, torch_compile", peers.cut_cross_entropy, "cross-entropy"),
}
QUICK_WAYS = ("products", "opsdl-auto", "opsdl-skip", "plain", "opsdl-ce")  # without compilers and other packages
