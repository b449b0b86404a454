"""The kernels on the GPU at hand: errors against float64, times and memory, into bench/gpu_report.md.

    python bench/gpu_check.py

Takes some minutes; the largest shape needs about 40 GB. Without a GPU it says so and exits with 2. Peers that are not
installed (bench/requirements-peers.txt) are left out, and what does not fit into memory is reported as such.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import opsdl  # noqa: E402
from bench import gpu_model, gpu_prefix, peers  # noqa: E402
from bench.inputs import Inputs  # noqa: E402
from opsdl.files import write_whole  # noqa: E402

REPORT = ROOT / "bench" / "gpu_report.md"
TIMES_PLAIN_TORCH = 3.0  # a kernel's error may be so many times that of backend "torch" at the same dtype
WARM_UP, ROUNDS = 2, 7

# Options of the losses; "size": of the teacher's own head, "noise": of the teacher's hidden states.
VARIANTS: dict[str, dict[str, Any]] = {
    "one head": {"noise": 0.3},
    "one head, close": {"noise": 0.003},
    "one head, bias, cap, temperature": {"noise": 0.3, "bias": True, "softcap": 20.0, "temperature": 0.7},
    "two heads, padding": {"size": 320, "bias": True, "padding": 77},
    "sampled token": {"noise": 0.3, "loss": "policy"},
    "log prob": {"loss": "log_prob"},
}
CHECKED = (300, 520, 5003)  # N, H, V: whole multiples of no tile


def made(dtype: torch.dtype, *, noise=0.0, size=None, bias=False, padding=0, **_: Any) -> dict[str, Tensor | None]:
    """Random operands on the GPU, rounded to dtype."""
    N, H, V = CHECKED
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")  # noqa: E731
    hidden_NH = draw(N, H)
    out = {
        "hidden": hidden_NH,
        "weight": draw(V, H) * 2.5 / H**0.5,
        "teacher": hidden_NH + noise * draw(N, H) if size is None else draw(N, size),
        "teacher_weight": None if size is None else draw(V, size) * 2.5 / size**0.5,
        "bias": draw(V) if bias else None,
    }
    out = {name: None if x is None else x.to(dtype) for name, x in out.items()}
    return {**out, "tokens": torch.randint(V - padding, (N,), generator=generator, device="cuda")}


def results(
    x: dict[str, Tensor | None], backend: str, wide: bool, *, loss="kl", padding=0, **options: Any
) -> dict[str, Tensor]:
    """Values and gradients of one loss; wide: in float64."""
    x = {name: t.double() if wide and t is not None and t.is_floating_point() else t for name, t in x.items()}
    leaves = {name: x[name].detach().requires_grad_() for name in ("hidden", "weight", "bias") if x[name] is not None}
    hidden, weight, bias = (leaves.get(name) for name in ("hidden", "weight", "bias"))
    shared = {name: options[name] for name in ("softcap", "temperature") if name in options}
    shared |= {"reduction": "none", "backend": backend, "vocab_size": CHECKED[2] - padding if padding else None}
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
    weights = torch.linspace(0.5, 1.5, len(values), device="cuda") / 8192
    gradients = torch.autograd.grad((values * weights.to(values.dtype)).sum(), list(leaves.values()))
    return {"value": values.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def error(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected).norm() / expected.norm())


def accuracy() -> tuple[list[str], bool]:
    """Markdown rows, and whether all passed."""
    rows = ["| dtype | loss | result | error | backend torch | |", "|---|---|---|---|---|---|"]
    good = True
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, options in VARIANTS.items():
            x = made(dtype, **options)
            expected = results(x, "reference", True, **options)
            plain, ours = (results(x, backend, False, **options) for backend in ("torch", "triton"))
            for what, truth in expected.items():
                ours_error, plain_error = error(ours[what], truth), error(plain[what], truth)
                passed = ours_error <= max(TIMES_PLAIN_TORCH * plain_error, 1e-6)
                good &= passed
                mark = "" if passed else "**too large**"
                rows.append(f"| {str(dtype)[6:]} | {name} | {what} | {ours_error:.1e} | {plain_error:.1e} | {mark} |")
    return rows, good


def measured(step: Callable[[], object]) -> tuple[float, int]:
    """(median milliseconds, peak bytes above what was there before)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times), torch.cuda.max_memory_allocated() - before


def with_gradients(loss: peers.Loss, inputs: Inputs) -> Callable[[], object]:
    def step() -> object:
        x = inputs.leaves()
        return torch.autograd.grad(loss(x), (x.hidden_NH, x.weight_VH))

    return step


def cases(x: Inputs) -> dict[str, Callable[[], Callable[[], object]]]:
    """label -> a function that makes the step; ImportError where a peer is missing."""
    ours = lambda backend: lambda i: opsdl.fused_reverse_kl(i.hidden_NH, i.weight_VH, i.teacher_NH, backend=backend)  # noqa: E731
    rows_N = torch.arange(len(x.hidden_NH), device="cuda")
    far_N = torch.zeros_like(rows_N, dtype=torch.int8)
    inputs = (x.hidden_NH, x.weight_VH, None, x.teacher_NH, None, None, far_N, rows_N, None, 1.0, None)

    def moments() -> Callable[[], object]:
        from opsdl.kernels.forward import linear_moments
        from opsdl.kernels.operands import Operands

        operands = Operands(*inputs)
        return lambda: linear_moments(operands)

    def gradient() -> Callable[[], object]:
        from opsdl.kernels.backward import linear_gradient
        from opsdl.kernels.operands import Operands

        operands = Operands(*inputs)
        factors = [torch.full((len(rows_N),), value, device="cuda") for value in (5.0, 5.0, 0.0, 1e-4, 0.0, 0.0)]
        out = torch.empty_like(x.hidden_NH), torch.empty(x.weight_VH.shape, device="cuda"), None
        return lambda: linear_gradient(operands, factors, *out)

    return {
        "opsdl, backend triton": lambda: with_gradients(ours("triton"), x),
        "- linear_moments alone": moments,
        "- linear_gradient alone": gradient,
        "opsdl, backend torch": lambda: with_gradients(ours("torch"), x),
        "four bare products": lambda: lambda: bare(x),
        "plain formula": lambda: with_gradients(peers.plain(), x),
        "plain formula, torch.compile": lambda: with_gradients(peers.plain_compiled(), x),
        "Liger, compiled": lambda: with_gradients(peers.liger_compiled(), x),
        "TRL 1.16": lambda: with_gradients(peers.trl_default(), x),
    }


def bare(x: Inputs) -> tuple[Tensor, Tensor]:
    logits_NV = x.hidden_NH @ x.weight_VH.T
    x.teacher_NH @ x.weight_VH.T
    return logits_NV @ x.weight_VH, logits_NV.T @ x.hidden_NH


def timings(N: int, H: int, V: int) -> list[str]:
    """Markdown rows of one shape, beside the model of gpu_model.py."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")  # noqa: E731
    hidden_NH, tokens_N = draw(N, H), torch.randint(V, (N,), generator=generator, device="cuda")
    teacher_NH, weight_VH = hidden_NH + 0.3 * draw(N, H), draw(V, H).mul_(2.5 / H**0.5)
    x = Inputs(*(t.bfloat16() for t in (hidden_NH, weight_VH, teacher_NH)), tokens_N)
    del hidden_NH, weight_VH, teacher_NH
    model = gpu_model.whole_seconds(gpu_model.count(N, H, V)) * 1e3
    columns = "| case | ms | TFLOP/s of four products | extra MiB |"
    rows = [f"## N={N} H={H} V={V}, bf16\n", columns, "|---|---|---|---|"]
    for label, make in cases(x).items():
        try:
            milliseconds, extra = measured(make())
        except ImportError as missing:
            rows.append(f"| {label} | not installed ({missing.name}) | | |")
            continue
        except torch.OutOfMemoryError:
            rows.append(f"| {label} | out of memory | | |")
            continue
        finally:
            torch.cuda.empty_cache()
        rate = 4 * 2 * N * V * H / milliseconds / 1e9
        rows.append(f"| {label} | {milliseconds:.2f} | {rate:.0f} | {extra / 2**20:.0f} |")
    return [*rows, "", f"Model of the Triton kernels on an H100 SXM (gpu_model.py): {model:.2f} ms.", ""]


HEADER = """\
# The Triton kernels on {device}

torch {torch}, Triton {triton}. Errors are relative (Frobenius) against float64 on the same inputs; a result passes
when its error is at most {times:g} times that of backend "torch" at the same dtype. Times are medians of {rounds}
rounds of forward and backward to dHidden and dHead; extra MiB is the peak of allocated memory beyond the inputs,
gradients included.
"""


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_check: no GPU here (torch.cuda.is_available() is False); nothing was run")
        return 2
    import triton

    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    lines = [HEADER.format(device=device, times=TIMES_PLAIN_TORCH, rounds=ROUNDS, **versions)]
    rows, good = accuracy()
    lines += ["## Errors\n", *rows, ""]
    print("\n".join(lines), flush=True)
    for shape in gpu_model.SHAPES:
        part = timings(*shape)
        print("\n".join(part), flush=True)
        lines += part
        write_whole(REPORT, "\n".join(lines))  # kept when a later shape fails
    rows, prefix_good = gpu_prefix.accuracy()
    part = ["## Operators of shared prefixes\n", *rows, "", *gpu_prefix.timings(measured), ""]
    print("\n".join(part), flush=True)
    write_whole(REPORT, "\n".join(lines + part))
    good &= prefix_good
    if not good:
        print("gpu_check: errors too large, see the table")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
