"""Small random inputs for the kernels, and the answers in float64."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from opsdl.losses import moments, teacher

VARIANTS: dict[str, dict[str, Any]] = {
    "one head": {},
    "one head, close": {"noise": 3e-3},
    "one head, bias and cap": {"bias": True, "softcap": 6.0, "temperature": 0.7},
    "one head, most logits at the cap": {"softcap": 2.0, "scale": 6.0},
    "one head, padding and cap": {"bias": True, "padding": 20, "softcap": 6.0},
    "two heads": {"teacher_size": 40},
    "two heads, the student's padded, and tokens": {"teacher_size": 24, "bias": True, "padding": 20, "tokens": True},
    "no teacher": {"teacher_size": None, "tokens": True},
}


def make(dtype, tokens_count, size, vocabulary, *, seed, noise=0.3, teacher_size=0, bias=False, padding=0, tokens=False,
         softcap=None, temperature=1.0, scale=1.0) -> dict[str, Any]:  # fmt: skip
    """Arguments of `linear_moments`; teacher_size 0 is the student's own head, None no teacher."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden = (scale * draw(tokens_count, size)).to(dtype)
    weight = (draw(vocabulary, size) * 2.5 / size**0.5).to(dtype)
    student_bias = draw(vocabulary) if bias else None
    if padding:
        student_bias[-padding:] = -torch.inf
    head = teacher.Head(weight, student_bias, temperature, softcap)
    second = None
    if teacher_size == 0:
        teacher_hidden = (hidden.float() + scale * noise * draw(tokens_count, size)).to(dtype)
        second = teacher.SharedHead(hidden, teacher_hidden, head)
    elif teacher_size is not None:
        own = (draw(vocabulary, teacher_size) * 2.5 / teacher_size**0.5).to(dtype)
        teacher_head = teacher.Head(own, draw(vocabulary) if bias else None, temperature, softcap)
        teacher_hidden = draw(tokens_count, teacher_size).to(dtype)
        second = teacher.OwnHead(teacher_hidden, teacher_head)
    index = torch.arange(tokens_count)
    form = second.gap_form(index) if isinstance(second, teacher.SharedHead) else None
    bias_of_teacher = None if second is None or (form is not None and dtype == torch.float32) else second.head.bias
    return {
        "hidden_MH": hidden,
        "weight_VH": weight,
        "bias_V": student_bias,
        "teacher_MK": None if second is None else teacher_hidden,
        "teacher_weight_VK": None if second is None or form is not None else own,
        "teacher_bias_V": bias_of_teacher,
        "gap_form_N": form,
        "index_N": index,
        "tokens_N": torch.randint(vocabulary - padding, (tokens_count,), generator=generator) if tokens else None,
        "temperature": temperature,
        "softcap": softcap,
    }


def logits_and_gap(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(z, gap, dz / draw) by the formulas, from the very same inputs."""
    to = lambda x: None if x is None else x.to(dtype)  # noqa: E731
    cap, temperature = inputs["softcap"], inputs["temperature"]

    def logits(raw):
        return (raw if cap is None else torch.where(raw > -torch.inf, cap * torch.tanh(raw / cap), raw)) / temperature

    hidden, teacher_hidden = to(inputs["hidden_MH"]), to(inputs["teacher_MK"])
    raw = hidden @ to(inputs["weight_VH"]).T
    slope = torch.ones_like(raw) / temperature
    if inputs["bias_V"] is not None:
        raw = raw + to(inputs["bias_V"])
    z = logits(raw)
    if cap is not None:
        slope = (1 - torch.tanh(raw / cap) ** 2) / temperature
    if teacher_hidden is None:
        return z, torch.zeros_like(z), slope
    form = inputs["gap_form_N"]
    is_difference = torch.zeros(len(raw), 1, dtype=torch.bool) if form is None else form[:, None] > 0
    own_head = inputs["teacher_weight_VK"]
    second = torch.where(is_difference, hidden - teacher_hidden, teacher_hidden) if own_head is None else teacher_hidden
    second = second @ to(inputs["weight_VH"] if own_head is None else own_head).T
    bias = 0 if inputs["teacher_bias_V"] is None else to(inputs["teacher_bias_V"])
    z_teacher = logits(torch.where(is_difference, raw - second, second + bias))
    lost = torch.where(is_difference, torch.inf, -z_teacher)
    return z, torch.where(z > -torch.inf, z - z_teacher, lost), slope


def solve(inputs: dict[str, Any], package: str = "opsdl.kernels") -> dict[str, Tensor]:
    """Statistics and gradients from the kernels, wherever they run; dLoss/dLogit factors are random but fixed."""
    forward, backward, operands = (
        importlib.import_module(f"{package}.{name}") for name in ("forward", "backward", "operands")
    )
    given = operands.Operands(**inputs)
    moments_7SN, picked_3N = forward.linear_moments(given)
    stats = moments.statistics(moments.merge(moments_7SN))
    hidden, weight = inputs["hidden_MH"], inputs["weight_VH"]
    grads = torch.empty_like(hidden), torch.empty(weight.shape), torch.empty(len(weight))
    factors_6N = [stats["top"], stats["log_sum"], stats["mean_gap"], *factors(inputs)]
    backward.linear_gradient(given, factors_6N, *grads)
    picked = {} if inputs["tokens_N"] is None else {"picked": picked_3N}
    return {**stats, **picked, "hidden": grads[0], "weight": grads[1], "bias": grads[2]}


def expect(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What `solve` should give, in float64."""
    z, gap, slope = logits_and_gap(inputs)
    stats = moments.statistics(moments.merge(moments.measure(z, gap)[:, None]))
    p = (z - stats["student_lse"][:, None]).exp()
    on_gap, on_prob, on_token = (x.double()[:, None] for x in factors(inputs))
    gap = torch.where(z > -torch.inf, gap, 0.0)
    grad = p * (on_gap * (gap - stats["mean_gap"][:, None]) + on_prob)
    picked = {}
    if inputs["tokens_N"] is not None:
        tokens = inputs["tokens_N"][:, None]
        grad = grad.scatter_add(1, tokens, on_token.expand_as(tokens))
        picked = {"picked": torch.stack([x.gather(1, tokens)[:, 0] for x in (z, gap, slope)])}
    grad = torch.where(z > -torch.inf, grad * slope, 0.0)
    gradients = {"hidden": grad @ inputs["weight_VH"].double(), "weight": grad.T @ inputs["hidden_MH"].double()}
    return {**stats, **picked, **gradients, "bias": grad.sum(0)}


def factors(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    on_gap, on_prob, on_token = torch.rand(3, len(inputs["hidden_MH"]), generator=generator) + 0.5
    if inputs["tokens_N"] is None:
        on_token = torch.zeros_like(on_token)
    if inputs["teacher_MK"] is None:
        on_gap = torch.zeros_like(on_gap)
    return on_gap, on_prob, on_token


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius error of each result."""
    out = {}
    for name, x in expected.items():
        size = float(x.norm())
        out[name] = float((got[name].double() - x).norm()) / size if size else float(got[name].abs().max())
    return out


# float32 sums of products of these sizes; gradients are rounded to the operands' type once in the workspace, and
# dHidden, the bf16 and fp16 ones, once more.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def check(inputs: dict[str, Any], got: dict[str, Tensor]) -> None:
    rounding = ROUNDING[inputs["hidden_MH"].dtype]
    for name, error in errors(got, expect(inputs)).items():
        limit = {"hidden": 2 * rounding, "weight": 2 * rounding, "bias": 2 * rounding, "kl": 1e-4}.get(name, 1e-5)
        assert error <= limit, f"{name}: relative error {error:.1e}, limit {limit:.1e}"
