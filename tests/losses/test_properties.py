"""The losses over random shapes, layouts, dtypes, scales, masks and padding (hypothesis, the same in every run).

A backend may err against float64 by a few times what the plain formula errs in float32 (float64 for float64) on the
same inputs, plus one rounding of the result. What the plain formula errs is measured twice: by running it, and by
moving every input by half a unit of that arithmetic, which leaves no lucky draws.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsdl.losses import fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl, reference
from opsdl.losses.arguments import token_scale
from tests.support.losses import has

FACTOR = 8  # C++ exp errs by 3.4 units where libm errs by 1; the rest is for the draw
BF16_LOGITS = 2**-8  # of each entry of the gradient for the logits: rounded to bf16, from numbers kept in fp16
TENSORS = "student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias"
PAIRS = [
    ("cpu", torch.bfloat16), ("cpu", torch.float16), ("cpu", torch.float32),
    ("torch", torch.bfloat16), ("torch", torch.float16), ("torch", torch.float32), ("torch", torch.float64),
]  # fmt: skip
PAIRS = [pair for pair in PAIRS if has(pair[0])]
quick = settings(
    derandomize=True, max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@dataclass
class Case:
    """One call: which loss, the tensors of `TENSORS` (None where absent), tokens, options, and the gradient's seed."""

    loss: str
    inputs: dict[str, torch.Tensor | None]
    tokens: torch.Tensor
    options: dict
    seed: int

    def map(self, change) -> Case:
        return replace(self, inputs={k: None if x is None else change(x) for k, x in self.inputs.items()})

    def call(self, backend, **changed):
        """(loss, stats, leaves) with the student's tensors as leaves."""
        student = [k for k in TENSORS[:3] if self.inputs[k] is not None]
        given_ = self.inputs | {k: self.inputs[k].detach().requires_grad_() for k in student}
        options = self.options | changed | {"backend": backend, "return_stats": True}
        hidden, weight, bias, *teacher = (given_[k] for k in TENSORS)
        if self.loss == "log_prob":
            loss, stats = fused_log_prob(hidden, weight, self.tokens, bias=bias, **options)
        elif self.loss == "kl":
            loss, stats = fused_reverse_kl(
                hidden, weight, *teacher[:2], student_bias=bias, teacher_bias=teacher[2], **options
            )
        else:
            baseline = "kl" if self.loss == "policy with baseline" else None
            options |= dict(student_bias=bias, teacher_bias=teacher[2], baseline=baseline)
            loss, stats = fused_policy_reverse_kl(hidden, weight, *teacher[:2], self.tokens, **options)
        return loss, stats, [given_[k] for k in student]

    def run(self, backend) -> tuple[torch.Tensor, list[torch.Tensor], dict]:
        """(loss, gradients, stats)."""
        loss, stats, leaves = self.call(backend)
        generator = torch.Generator().manual_seed(self.seed)
        # A scalar's gradient is rounded once in the forward; another factor than a power of 2 rounds it again.
        upstream = torch.randn(loss.shape, generator=generator) if loss.ndim else torch.tensor(-0.5)
        upstream = upstream.to(loss.dtype)
        return loss.detach(), torch.autograd.grad(loss, leaves, upstream), stats

    def jittered(self, unit: float) -> Case:
        """Every number moved by `unit` of itself, up or down."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        scalars = ("temperature", "softcap")
        moved = {k: x * (1 + unit) if k in scalars and x else x for k, x in self.options.items()}
        case = replace(self, options=moved)
        return case.map(lambda x: x * (1 + unit * (torch.randint(2, x.shape, generator=generator) * 2 - 1)))

    def logit_gradient(self, capped: bool = False) -> torch.Tensor:
        """[N, V] of the loss in float64, for raw or for capped logits: as hidden states that are those logits."""
        x = self.map(torch.Tensor.double).inputs
        eye = torch.eye(len(x["student_weight"]), dtype=torch.float64)

        def logits(side: str, head: str) -> dict[str, torch.Tensor]:
            z, bias = x[f"{side}_hidden"] @ x[f"{head}_weight"].mT, x[f"{head}_bias"]
            if capped:  # of the bias, the padding is left
                z = self.options["softcap"] * torch.tanh((z if bias is None else z + bias) / self.options["softcap"])
                bias = None if bias is None else torch.where(bias > -torch.inf, 0.0, bias)
            return {f"{side}_hidden": z, f"{side}_weight": eye, f"{side}_bias": bias}

        changed = logits("student", "student")
        if x["teacher_hidden"] is not None:
            changed |= logits("teacher", "student" if x["teacher_weight"] is None else "teacher")
        options = self.options | ({"softcap": None} if capped else {})
        return replace(self, inputs=x | changed, options=options).run("reference")[1][0]

    def rounding(self, unit: float, stats: dict) -> torch.Tensor:
        """[N, V] in the gradient for the logits: one unit of p gap in p (gap - mean gap), of A p in A (p - 1).

        And what the truth itself rounds: float64 units of what is as large as a logsumexp.
        """
        options, (hidden, weight, bias, *teacher) = self.options, (self.inputs[k] for k in TENSORS)
        more, V = (options["temperature"], options["softcap"]), options["vocab_size"]
        z = reference.logits(hidden, weight, bias, *more)
        own = (weight, bias) if teacher[1] is None else teacher[1:]
        z_teacher = z if self.loss == "log_prob" else reference.logits(teacher[0], *own, *more)
        z, z_teacher = z[:, :V], z_teacher[:, :V]
        if self.loss == "kl":
            factor = torch.where(z > -torch.inf, z - z_teacher, 0.0)
        else:
            factor = stats.get("advantage", torch.ones(len(z)))[:, None]
        reduced = options.get("mask"), options.get("token_weights"), options["reduction"]
        scale = token_scale(z, *reduced, z.dtype).abs()
        large_N1 = (1 + z.logsumexp(-1).abs() + z_teacher.logsumexp(-1).abs())[:, None]
        entry = z.softmax(-1).scatter_add(1, self.tokens[:, None], torch.ones_like(large_N1))
        size = z.softmax(-1) * factor.abs() * unit + entry * large_N1 * 2**-52
        size = size * scale[:, None] / options["temperature"]
        return torch.nn.functional.pad(size, (0, len(weight) - size.shape[1]))


def strided(x, layout):
    """The same numbers, lying otherwise in memory."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "sliced":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if layout == "expanded" and len(x):
        return x[:1].expand_as(x)
    return x


tile_sizes = st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257, 385])
layouts = st.sampled_from(["contiguous", "transposed", "sliced"])


@st.composite
def cases(draw, dtype, on_torch):
    generator = torch.Generator().manual_seed(seed := draw(st.integers(0, 2**31)))
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    loss = draw(st.sampled_from(["kl", "kl", "policy", "policy with baseline", "log_prob"]))
    N, H = draw(st.integers(0, 70) | st.sampled_from([1, 64, 65])), draw(st.integers(1, 70))
    V, padding = draw(st.integers(1, 400) | tile_sizes), draw(st.sampled_from([0, 0, 1, 40]))
    shared = draw(st.booleans())
    K = H if shared else draw(st.integers(1, 70))
    scale, apart = 10 ** draw(st.floats(-2, 4)), 10 ** draw(st.floats(-3, 1))
    student = strided(randn(N, H), draw(layouts | st.just("expanded")))
    teacher = student + apart * randn(N, H) if K == H else randn(N, K)
    inputs = dict.fromkeys(TENSORS)
    inputs["student_hidden"] = student * scale
    inputs["student_weight"] = strided(randn(V + padding, H) / H**0.5, draw(layouts))
    beta = draw(st.sampled_from([0.0, 0.3, 1.0])) if on_torch and loss == "kl" else 1.0
    hole = draw(st.just(0) | st.integers(0, V - 1))  # entries that are padding by a bias of -inf
    biased = hole > 0 or draw(st.booleans())
    if biased:
        inputs["student_bias"] = randn(V + padding)
        inputs["student_bias"][V - hole : V] = -torch.inf
    if loss != "log_prob":
        inputs["teacher_hidden"] = strided(teacher * scale, draw(layouts))
        if not shared:
            inputs["teacher_weight"] = strided(randn(V + padding, K) / K**0.5, draw(layouts))
            if biased:
                inputs["teacher_bias"] = randn(V + padding)
                if draw(st.booleans()):  # else the teacher has mass where the student has none
                    inputs["teacher_bias"][V - hole : V] = -torch.inf
    limit = min(torch.finfo(dtype).max / 2, 1e30)
    inputs = {k: x if x is None or "bias" in k else x.clamp(-limit, limit).to(dtype) for k, x in inputs.items()}
    options = dict(
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        temperature=draw(st.sampled_from([1.0, 0.5, 2.5])),
        softcap=draw(st.sampled_from([None, None, 5.0, 30.0])),
        vocab_size=V if padding else None,
    )
    if beta != 1:
        options["beta"] = beta
    keep = draw(st.sampled_from([None, 0.0, 0.7, 1.0]))
    if keep is not None:
        options["mask"] = torch.rand(N, generator=generator) < keep
    if draw(st.booleans()):
        options["token_weights"] = randn(N) * (torch.rand(N, generator=generator) < 0.8)
    tokens = torch.randint(V - hole, (N,), generator=generator)
    case = Case(loss, inputs, tokens, options, seed)
    return case.map(torch.Tensor.double) if dtype == torch.float64 else case


def distance(x, y):
    return float((x.detach().double() - y.detach().double()).norm())


def assert_near(got, truth, allowed):
    """Within `allowed` and one rounding to its dtype; finite where the truth is, unless the dtype cannot hold it."""
    if not truth.isfinite().all() or not truth.to(got.dtype).isfinite().all():
        return
    assert got.isfinite().all()
    info = torch.finfo(got.dtype)
    rounding = info.eps / 2 * float(truth.norm()) + info.smallest_normal * info.eps * truth.numel() ** 0.5
    assert distance(got, truth) <= FACTOR * allowed + rounding


@pytest.mark.parametrize("backend, dtype", PAIRS, ids=str)
@given(data=st.data())
@quick
def test_error_is_that_of_the_plain_formula(backend, dtype, data):
    case = data.draw(cases(dtype, on_torch=backend == "torch"))
    exact, wide = case.map(torch.Tensor.double), torch.promote_types(dtype, torch.float32)
    plain = case.map(lambda x: x.to(wide))
    unit = torch.finfo(wide).eps / 2
    others = [exact.jittered(unit), exact.jittered(-unit), plain]
    loss, gradients, stats = case.run(backend)
    truth, true_gradients, true_stats = exact.run("reference")
    outcomes = [other.run("reference") for other in others]

    # Errors of single tokens do not cancel in the allowance, whatever the signs of their weights.
    truths = exact.call("reference", reduction="none")[0].detach()
    single = sum((other.call("reference", reduction="none")[0].detach() - truths).abs() for other in others)
    # One unit of the logsumexps that are subtracted: by the truth in float64, far from KL 0 by any form of the KL, and
    # by every form of a log probability.
    size = sum(1 + true_stats[k].abs() for k in true_stats if "lse" in k)
    of_kl = torch.zeros_like(size)
    if "kl" in true_stats:
        apart = (true_stats["kl"] > 0.5) | ((true_stats["student_lse"] - true_stats["teacher_lse"]).abs() > 40)
        of_kl = 2**-52 + unit * apart
    if case.loss == "kl":
        single = single + size * of_kl
    elif case.loss == "log_prob":
        single = single + size * unit
    else:
        advantage = true_stats["advantage"].abs()
        single = single + size * unit * (advantage + truths.abs() / advantage.clamp(min=1e-30))
    count = len(case.tokens) if case.options.get("mask") is None else int(case.options["mask"].sum())
    share = 1 / max(count, 1) if case.options["reduction"] == "mean" else 1
    assert_near(loss, truth, float(single.norm() if loss.ndim else single.sum() * share))
    size_NV = exact.rounding(unit, true_stats)
    if case.options["softcap"]:  # its slope is 1 - tanh^2, of whose square float arithmetic keeps one unit
        size_NV = size_NV + case.logit_gradient(capped=True).abs() * 2 * unit
    if backend == "cpu" and dtype == torch.bfloat16:
        size_NV = size_NV + case.logit_gradient().abs() * BF16_LOGITS / FACTOR
    hidden, weight = exact.inputs["student_hidden"].abs(), exact.inputs["student_weight"].abs()
    rounding = [size_NV @ weight, size_NV.mT @ hidden, size_NV.sum(0)]
    for place, (got, true) in enumerate(zip(gradients, true_gradients, strict=True)):
        allowed = sum(distance(outcome[1][place], true) for outcome in outcomes)
        if truth.isfinite().all():
            assert_near(got, true, allowed + float(rounding[place].norm()))
    for name, x in stats.items():
        errors = [distance(outcome[2][name], true_stats[name]) for outcome in outcomes]
        own = of_kl if name == "kl" else unit
        assert_near(x, true_stats[name], sum(errors) + float((own * size).norm()))
    if "kl" in stats:
        assert (stats["kl"] >= 0).all()


@pytest.mark.parametrize("backend, dtype", PAIRS, ids=str)
@given(data=st.data())
@settings(quick, max_examples=15)
def test_masked_tokens_are_worth_nothing(backend, dtype, data):
    """All masked: value, statistics and gradients are exactly 0."""
    case = data.draw(cases(dtype, on_torch=backend == "torch"))
    N = len(case.tokens)
    masked = replace(case, options=case.options | {"mask": torch.zeros(N, dtype=torch.bool)})
    loss, gradients, stats = masked.run(backend)
    assert not any(x.any() for x in (loss, *gradients, *stats.values()))


@pytest.mark.parametrize("backend, dtype", PAIRS, ids=str)
@given(data=st.data())
@settings(quick, max_examples=8)
def test_leading_dimensions_do_not_matter(backend, dtype, data):
    """[1, N, H] and [N, 1, H] give the numbers of [N, H], and [H] the one of [1, H]."""
    case = data.draw(cases(dtype, on_torch=backend == "torch"))
    case.options |= {"reduction": "none"}
    loss, gradients, _ = case.run(backend)
    N = len(case.tokens)
    shapes = [(1, N), (N, 1), *([()] if N == 1 else [])]
    for shape in shapes:
        shaped = lambda x, last, shape=shape: None if x is None else x.reshape((*shape, *last))  # noqa: E731
        inputs = {k: shaped(x, x.shape[1:]) if "hidden" in k and x is not None else x for k, x in case.inputs.items()}
        options = {k: shaped(x, ()) if k in ("mask", "token_weights") else x for k, x in case.options.items()}
        other = replace(case, inputs=inputs, options=options, tokens=shaped(case.tokens, ()))
        other_loss, others, _ = other.run(backend)
        assert other_loss.shape == shape and torch.equal(other_loss.flatten(), loss)
        assert shape == () or all(torch.equal(x.flatten(), y.flatten()) for x, y in zip(others, gradients, strict=True))
