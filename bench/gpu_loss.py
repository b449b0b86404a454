"""The losses on a GPU: errors against float64, and times beside plain torch and peers; a part of bench/gpu_check.py."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import opsdl
from bench import peers
from bench.gpu_model import KERNELS
from bench.gpu_place import Place
from bench.harness import Step, time_in_turn
from bench.inputs import Inputs
from bench.results import Case, Number

TIMES_PLAIN_TORCH = 3.0  # a kernel's error may be so many times that of backend "torch" at the same dtype

# Options of the losses; "size": of the teacher's own head, "noise": of the teacher's hidden states.
VARIANTS: dict[str, dict[str, Any]] = {
    "one head": {"noise": 0.3},
    "one head, close": {"noise": 0.003},
    "one head, bias, cap, temperature": {"noise": 0.3, "bias": True, "softcap": 20.0, "temperature": 0.7},
    "two heads, padding": {"size": 320, "bias": True, "padding": 77},
    "sampled token": {"noise": 0.3, "loss": "policy"},
    "log prob": {"noise": 0.3, "loss": "log_prob"},
}


@contextlib.contextmanager
def launches() -> Iterator[dict[str, int]]:
    """Within: the launches of each Triton kernel of ours are counted; nothing is where there is no Triton."""
    counts: dict[str, int] = {}
    with contextlib.ExitStack() as undo:
        if importlib.util.find_spec("triton") is not None:
            for file, names in KERNELS.items():
                module = importlib.import_module(f"opsdl.kernels.{file}")
                for name in names:
                    kernel = getattr(module, name)
                    undo.callback(setattr, module, name, kernel)
                    counts[name] = 0
                    setattr(module, name, _Counted(kernel, name, counts))
        yield counts


class _Counted:
    """A kernel that counts how often it is launched."""

    def __init__(self, kernel: Any, name: str, counts: dict[str, int]) -> None:
        self._kernel, self._name, self._counts = kernel, name, counts

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self._counts[self._name] += 1
        return self._kernel[grid]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def operands(
    place: Place, dtype: torch.dtype, *, noise=0.0, size=None, bias=False, padding=0, **_: Any
) -> dict[str, Tensor | None]:
    """Random operands, rounded to dtype."""
    N, H, V = place.checked
    hidden_NH = place.draw(N, H)
    out = {
        "hidden": hidden_NH,
        "weight": place.draw(V, H, seed=1) * 2.5 / H**0.5,
        "teacher": hidden_NH + noise * place.draw(N, H, seed=2) if size is None else place.draw(N, size, seed=2),
        "teacher_weight": None if size is None else place.draw(V, size, seed=3) * 2.5 / size**0.5,
        "bias": place.draw(V, seed=4) if bias else None,
    }
    rounded = {name: None if x is None else x.to(dtype) for name, x in out.items()}
    return {**rounded, "tokens": place.integers(V - padding, N)}


def outcome(
    place: Place, x: dict[str, Tensor | None], backend: str, wide: bool, *, loss="kl", padding=0, **options: Any
) -> dict[str, Tensor]:
    """Values and gradients of one loss; wide: in float64."""
    x = {name: t.double() if wide and t is not None and t.is_floating_point() else t for name, t in x.items()}
    leaves = {name: x[name].detach().requires_grad_() for name in ("hidden", "weight", "bias") if x[name] is not None}
    hidden, weight, bias = (leaves.get(name) for name in ("hidden", "weight", "bias"))
    shared = {name: options[name] for name in ("softcap", "temperature") if name in options}
    shared |= {"reduction": "none", "backend": backend}
    shared |= {"vocab_size": place.checked[2] - padding} if padding else {}
    if loss == "log_prob":
        values = opsdl.fused_log_prob(hidden, weight, x["tokens"], bias=bias, **shared)
    else:
        teacher_bias = bias.detach() if bias is not None and x["teacher_weight"] is not None else None
        teacher = (hidden, weight, x["teacher"], x["teacher_weight"])
        biases = {"student_bias": bias, "teacher_bias": teacher_bias}
        if loss == "policy":
            values = opsdl.fused_policy_reverse_kl(*teacher, x["tokens"], **biases, **shared)
        else:
            values = opsdl.fused_reverse_kl(*teacher, **biases, **shared)
    # Weights far below 1, as those of a mean over many tokens are.
    weights = torch.linspace(0.5, 1.5, len(values), device=place.device) / 8192
    gradients = torch.autograd.grad((values * weights.to(values.dtype)).sum(), list(leaves.values()))
    return {"value": values.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def error(x: Tensor, expected: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return float((x.double() - expected).norm() / expected.norm())


def accuracy(place: Place) -> list[Case]:
    """A case for each dtype, loss and result: its error, and the limit from backend "torch" on the same inputs."""
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, options in VARIANTS.items():
            x = operands(place, dtype, **options)
            expected = outcome(place, x, "reference", True, **options)
            plain, ours = (outcome(place, x, backend, False, **options) for backend in ("torch", place.backend))
            for what, truth in expected.items():
                limit = max(TIMES_PLAIN_TORCH * error(plain[what], truth), 1e-6)
                numbers = {"error": Number(error(ours[what], truth), "1"), "limit": Number(limit, "1")}
                cases.append(Case("loss error", name, {"dtype": str(dtype)[6:], "result": what}, numbers))
    return cases


def steps(place: Place, x: Inputs) -> dict[str, Callable[[], Step]]:
    """Label -> a function that makes the step; it raises ImportError where a peer is missing."""

    def with_gradients(loss: peers.Loss) -> Step:
        def step() -> object:
            leaves = x.leaves()
            return torch.autograd.grad(loss(leaves), (leaves.hidden_NH, leaves.weight_VH))

        return step

    def ours(backend: str) -> Step:
        return with_gradients(lambda i: opsdl.fused_reverse_kl(i.hidden_NH, i.weight_VH, i.teacher_NH, backend=backend))

    def products() -> tuple[Tensor, Tensor]:
        logits_NV = x.hidden_NH @ x.weight_VH.T
        x.teacher_NH @ x.weight_VH.T
        return logits_NV @ x.weight_VH, logits_NV.T @ x.hidden_NH

    compiled = {} if place.dry else {  # compiling takes longer than all of a dry run
        "plain formula, torch.compile": lambda: with_gradients(peers.plain_compiled()),
        "Liger, compiled": lambda: with_gradients(peers.liger_compiled()),
    }  # fmt: skip
    return {
        f"opsdl, backend {place.backend}": lambda: ours(place.backend),
        "opsdl, backend torch": lambda: ours("torch"),
        "four bare products": lambda: products,
        "plain formula": lambda: with_gradients(peers.plain()),
        **compiled,
        "TRL": lambda: with_gradients(peers.trl_default()),
    }


def timings(place: Place, shape: tuple[int, int, int]) -> list[Case]:
    """A case for each way: forward and backward to dHidden and dHead in bf16, and the memory it takes beyond inputs."""
    N, H, V = shape
    hidden_NH, weight_VH = place.draw(N, H), place.draw(V, H, seed=1).mul_(2.5 / H**0.5)
    teacher_NH = hidden_NH + 0.3 * place.draw(N, H, seed=2)
    x = Inputs(*(t.bfloat16() for t in (hidden_NH, weight_VH, teacher_NH)), place.integers(V, N))
    del hidden_NH, weight_VH, teacher_NH
    of = {"N": N, "H": H, "V": V, "dtype": "bfloat16"}
    able: dict[str, Step] = {}
    memory: dict[str, int | None] = {}
    cases = []
    for label, make in steps(place, x).items():
        try:
            step = make()
            memory[label] = place.peak_bytes(step)
            able[label] = step
        except (ImportError, torch.OutOfMemoryError) as why:
            reason = "out of memory" if isinstance(why, torch.OutOfMemoryError) else f"not installed ({why.name})"
            cases.append(Case("loss time", label, of, {}, reason))
        place.forget()
    for label, rounds in time_in_turn(able, warm_up=2, clock=place.clock).items():
        peak = memory[label]
        extra = {} if peak is None else {"memory": Number(peak, "bytes")}
        cases.append(Case("loss time", label, of, {"time": Number.timed(rounds, "ms"), **extra}))
    return cases
