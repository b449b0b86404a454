"""The losses against float64: values, gradients, statistics, at KL from 1 down to 1e-7, in every dtype."""

import pytest
import torch

import opsdl.losses as losses
from opsdl.losses import FusedReverseKL, fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl, reference

N, H, V = 37, 24, 301
BACKENDS = [name for name in ("reference", "torch", "cpu") if losses.available_backends()[name] == "available"]


def relative(x, expected):
    return float((x.double() - expected.double()).norm() / expected.double().norm())


def make_inputs(noise, dtype=torch.float32, seed=0, teacher_hidden_size=H, tokens=N):
    """Student and teacher hidden states `noise` apart, heads scaled for logits of standard deviation 2.5."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    student_NH = draw(tokens, H)
    teacher_NH = student_NH + noise * draw(tokens, H) if teacher_hidden_size == H else draw(tokens, teacher_hidden_size)
    weights = [draw(V, h) * 2.5 / h**0.5 for h in (H, teacher_hidden_size)]
    return [x.to(dtype) for x in (student_NH, weights[0], teacher_NH, weights[1])]


def truth(student_NH, weight_VH, teacher_NH, teacher_VH, loss=None):
    """Per-token KL and the gradients of its mean, in float64, from the very same (rounded) inputs."""
    h, w = (x.double().requires_grad_() for x in (student_NH, weight_VH))
    z, z_teacher = h @ w.T, teacher_NH.double() @ teacher_VH.double().T
    # The reference's own digits end at 1e-16 / KL; c-centred sums as in terms.py, differentiated by formula.
    kl = reference.reverse_kl(z, z_teacher)
    kl.mean().backward()
    return kl.detach(), h.grad, w.grad


@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize("noise", [0.6, 0.05, 4e-3, 4e-4, 1.2e-4])
def test_accuracy_at_any_kl(noise, shared):
    student, weight, teacher, _ = make_inputs(noise)
    expected_kl, expected_h, expected_w = truth(student, weight, teacher, weight)
    h, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, stats = fused_reverse_kl(h, w, teacher, None if shared else weight, return_stats=True)
    loss.backward()
    # Two heads: the subtraction of float32 logits (rounding 3e-7 at |z| about 5) is what is left.
    logit_noise = 0.0 if shared else 3e-7 / float(expected_kl.mean()) ** 0.5
    assert relative(stats["kl"], expected_kl) < 2e-5 + 4 * logit_noise
    assert relative(h.grad, expected_h) < 2e-5 + 4 * logit_noise
    assert relative(w.grad, expected_w) < 2e-5 + 4 * logit_noise
    assert (stats["kl"] >= 0).all()


# Rounded to bf16 on the way: the result, and in the C++ the gradient for the logits too.
@pytest.mark.parametrize("backend, roundings", [("torch", 1), ("cpu", 2)])
@pytest.mark.parametrize("noise", [0.6, 0.05, 4e-3, 4e-4])
def test_bf16_inputs_cost_only_the_rounding_of_the_gradient(noise, backend, roundings):
    student, weight, teacher, _ = make_inputs(noise, torch.bfloat16)
    if (student == teacher).all():
        pytest.fail("noise too small for bf16: nothing to test")
    expected_kl, expected_h, expected_w = truth(student, weight, teacher, weight)
    h, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, stats = fused_reverse_kl(h, w, teacher, return_stats=True, backend=backend)
    loss.backward()
    rounding = [relative(x.bfloat16(), x) for x in (expected_h, expected_w)]
    assert h.grad.dtype == torch.bfloat16
    assert relative(h.grad, expected_h) <= 1.2 * roundings**0.5 * rounding[0]
    assert relative(w.grad, expected_w) <= 1.2 * roundings**0.5 * rounding[1]
    assert relative(stats["kl"], expected_kl) < 1e-5


@pytest.mark.parametrize("softcap, temperature", [(None, 1.0), (None, 0.7), (8.0, 1.0), (8.0, 1.3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_agree_with_the_reference(softcap, temperature, bias, shared, reduction):
    size = H if shared else 16
    student, weight, teacher, teacher_weight = make_inputs(0.3, torch.float64, teacher_hidden_size=size, tokens=24)
    generator = torch.Generator().manual_seed(7)
    options = dict(
        mask=torch.rand(4, 6, generator=generator) < 0.7,
        token_weights=torch.rand(4, 6, generator=generator, dtype=torch.float64),
        student_bias=torch.randn(V, generator=generator, dtype=torch.float64) if bias else None,
        teacher_bias=torch.randn(V, generator=generator, dtype=torch.float64) if bias and not shared else None,
        temperature=temperature, softcap=softcap, reduction=reduction, return_stats=True,
    )  # fmt: skip
    results = []
    for backend in ("torch", "reference"):
        leaves = [x.clone().requires_grad_() for x in (student.reshape(4, 6, H), weight)]
        if bias:
            options["student_bias"] = options["student_bias"].detach().clone().requires_grad_()
            leaves.append(options["student_bias"])
        loss, stats = fused_reverse_kl(
            *leaves[:2], teacher.reshape(4, 6, size), None if shared else teacher_weight, backend=backend, **options
        )
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, upstream), *stats.values()])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("baseline", [None, "kl"])
def test_policy_form(baseline):
    student, weight, teacher, teacher_weight = make_inputs(0.3, torch.float64)
    tokens = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    results = []
    for backend in ("torch", "reference"):
        h, w = (x.clone().requires_grad_() for x in (student, weight))
        loss = fused_policy_reverse_kl(h, w, teacher, teacher_weight, tokens, baseline=baseline, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, (h, w))])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("baseline", [None, "kl"])
def test_policy_gradient_expects_the_kl_gradient(baseline):
    """Summed over every token with its probability, the policy form IS the gradient of the KL."""
    student, weight, teacher, _ = make_inputs(0.3, torch.float64, tokens=1)
    h = student.clone().requires_grad_()
    fused_reverse_kl(h, weight, teacher).backward()
    every = student.expand(V, H).clone().requires_grad_()
    p = (student @ weight.T).softmax(-1)[0]
    fused_policy_reverse_kl(
        every, weight, teacher.expand(V, H), None, torch.arange(V), baseline=baseline, token_weights=p, reduction="sum"
    ).backward()
    assert torch.allclose(every.grad.sum(0), h.grad[0], rtol=1e-9, atol=1e-14)


def test_log_prob():
    student, weight, _, _ = make_inputs(0.3, torch.float64)
    tokens = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    h, w = (x.clone().requires_grad_() for x in (student, weight))
    got = fused_log_prob(h, w, tokens)
    expected = (h @ w.T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(got, expected)
    upstream = torch.randn(N, dtype=torch.float64)
    for x, y in zip(*(torch.autograd.grad(out, (h, w), upstream) for out in (got, expected)), strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    student, weight, teacher, teacher_weight = make_inputs(0.3, torch.float64, tokens=3)
    student, weight, bias = student[:, :5].clone(), weight[:11, :5].clone(), torch.randn(11, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (student, weight, bias)]
    torch.autograd.gradcheck(
        lambda h, w, b: fused_reverse_kl(
            h, w, teacher, teacher_weight[:11], student_bias=b, softcap=5.0, temperature=0.8, reduction=reduction
        ),
        leaves,
    )


def test_many_blocks_equal_one(monkeypatch):
    student, weight, teacher, _ = make_inputs(0.1)
    outs = []
    for block_bytes in (1 << 30, V * 4 * 5):  # one block; blocks of 5 tokens, the last of 2
        monkeypatch.setattr("opsdl.losses.engines.torch.BLOCK_BYTES", block_bytes)
        h, w = (x.clone().requires_grad_() for x in (student, weight))
        loss = fused_reverse_kl(h, w, teacher)
        loss.backward()
        outs.append((loss.detach(), h.grad, w.grad))
    for x, y in zip(*outs, strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-8)


def test_teacher_gets_no_gradient():
    inputs = [x.requires_grad_() for x in make_inputs(0.3)]
    student, weight, teacher, teacher_weight = inputs
    for backend in BACKENDS:
        for x in inputs:
            x.grad = None
        fused_reverse_kl(student, weight, teacher, teacher_weight, backend=backend).backward()
        assert teacher.grad is None and teacher_weight.grad is None and weight.grad.abs().sum() > 0
        fused_policy_reverse_kl(student, weight, teacher, None, torch.arange(N), backend=backend).backward()
        assert teacher.grad is None


def test_identical_student_and_teacher_give_exactly_zero():
    student, weight, _, _ = make_inputs(0.3)
    h = student.clone().requires_grad_()
    for teacher_weight in (None, weight.clone()):
        loss = fused_reverse_kl(h, weight, student, teacher_weight)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, h)
        assert gradient.abs().max() == 0


def test_padded_vocabulary_and_extreme_logits():
    student, weight, teacher, _ = make_inputs(0.3, torch.float64)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[-40:] = -torch.inf
    h, w = (x.clone().requires_grad_() for x in (student, weight))
    loss = fused_reverse_kl(h, w, teacher, student_bias=bias)
    expected = fused_reverse_kl(h, w[:-40], teacher)
    assert torch.allclose(loss, expected, rtol=1e-10)
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, (h, w)))
    for scale in (1e2, 1e4):
        h = (student * scale).float().requires_grad_()
        value = fused_reverse_kl(h, weight.float(), (teacher * scale).float())
        expected = fused_reverse_kl(h.double(), weight.float().double(), (teacher * scale).float().double())
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.autograd.grad(value, h)[0].isfinite().all()


def test_masked_tokens_may_hold_anything():
    student, weight, teacher, _ = make_inputs(0.3)
    mask = torch.ones(N, dtype=torch.bool)
    mask[::3] = False
    student[::3] = torch.nan
    for reduction in ("mean", "sum", "none"):
        h, w = (x.clone().requires_grad_() for x in (student, weight))
        loss = fused_reverse_kl(h, w, teacher, mask=mask, reduction=reduction)
        assert loss.isfinite().all()
        loss.sum().backward()
        assert h.grad.isfinite().all() and (h.grad[::3] == 0).all() and w.grad.isfinite().all()
    empty = fused_reverse_kl(h, w, teacher, mask=torch.zeros_like(mask))
    assert empty.item() == 0 and torch.autograd.grad(empty, w)[0].abs().sum() == 0


def test_shapes_strides_empty_and_autocast():
    student, weight, teacher, _ = make_inputs(0.3)
    expected = fused_reverse_kl(student, weight, teacher)
    strided = fused_reverse_kl(student.T.contiguous().T, weight.repeat(1, 2)[:, :H], teacher)
    assert torch.allclose(strided, expected)
    rounded = fused_reverse_kl(student.bfloat16(), weight.bfloat16(), teacher.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_reverse_kl(student, weight, teacher), rounded)
    nothing = fused_reverse_kl(student[:0], weight, teacher[:0], reduction="none")
    assert nothing.shape == (0,)
    assert fused_reverse_kl(student[:0], weight, teacher[:0]).item() == 0
    module = FusedReverseKL(reduction="sum")
    assert torch.allclose(module(student, weight, teacher), expected * N)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("tolerance", [0.3, 0.01, "auto"])
def test_skipped_tokens_keep_the_promised_accuracy(tolerance, backend):
    student, weight, _, _ = make_inputs(0.3, torch.bfloat16, tokens=200)
    spread = torch.logspace(-4, 0, 200)[:, None]  # from converged tokens to far ones, as in real training
    teacher = (student.float() + spread * torch.randn(200, H, generator=torch.Generator().manual_seed(5))).bfloat16()
    gradients = []
    for skip_tolerance in (None, tolerance):
        h, w = (x.float().requires_grad_() for x in (student, weight))
        h16, w16 = h.bfloat16(), w.bfloat16()  # the gradient arrives rounded once either way
        loss, stats = fused_reverse_kl(
            h16, w16, teacher, skip_tolerance=skip_tolerance, return_stats=True, backend=backend
        )
        gradients.append(torch.autograd.grad(loss, (h, w)))
    bound = torch.finfo(torch.bfloat16).eps / 20 if tolerance == "auto" else tolerance
    assert 0.02 < stats["skipped"].mean() < 0.98
    # The bound is on dlogits; the products with head and hidden states spread errors about as they spread the signal.
    for exact, got in zip(*gradients, strict=True):
        assert relative(got, exact) < 2 * bound + 0.003


def test_frozen_parts_get_no_work():
    student, weight, teacher, _ = make_inputs(0.3)
    h = student.clone().requires_grad_()
    fused_reverse_kl(h, weight, teacher).backward()
    assert h.grad is not None
    w = weight.clone().requires_grad_()
    fused_reverse_kl(student, w, teacher).backward()
    assert w.grad is not None
    assert not fused_reverse_kl(student, weight, teacher).requires_grad


def test_errors_name_the_argument():
    student, weight, teacher, teacher_weight = make_inputs(0.3)
    tokens = torch.zeros(N, dtype=torch.int64)
    good = (student, weight, teacher)
    cases = [
        (lambda: fused_reverse_kl(student[:, :5], weight, teacher), r"student_weight: \(301, 24\); expected \[V, 5\]"),
        (lambda: fused_reverse_kl(student, weight[:0], teacher), "student_weight.*at least one vocabulary entry"),
        (lambda: fused_reverse_kl(student, weight, teacher[:-1]), r"teacher_hidden: \(36, 24\)"),
        (lambda: fused_reverse_kl(*good, teacher_weight[:-1]), "teacher_weight: vocabulary of 300; expected 301"),
        (lambda: fused_reverse_kl(*good, teacher_weight[:, :-1]), r"teacher_weight: \(301, 23\)"),
        (lambda: fused_reverse_kl(student.long(), weight, teacher), "student_hidden: torch.int64"),
        (
            lambda: fused_reverse_kl(*good, student_bias=torch.zeros(3)),
            r"student_bias: torch.float32 \(3,\); expected floating point \(301,\)",
        ),
        (lambda: fused_reverse_kl(*good, teacher_bias=torch.zeros(V)), "teacher_bias: given without teacher_weight"),
        (lambda: fused_reverse_kl(*good, mask=torch.ones(N)), "mask: torch.float32"),
        (lambda: fused_reverse_kl(*good, mask=torch.ones(3, dtype=torch.bool)), r"mask: torch.bool \(3,\)"),
        (lambda: fused_reverse_kl(*good, token_weights=torch.ones(3)), r"token_weights: torch.float32 \(3,\)"),
        (lambda: fused_reverse_kl(*good, temperature=0.0), "temperature: 0.0"),
        (lambda: fused_reverse_kl(*good, softcap=-1.0), "softcap: -1.0"),
        (lambda: fused_reverse_kl(*good, reduction="avg"), "reduction: 'avg'"),
        (lambda: fused_reverse_kl(*good, skip_tolerance=1.0), "skip_tolerance: 1.0; expected None, 'auto'"),
        (lambda: fused_reverse_kl(*good, skip_tolerance="some"), "skip_tolerance: 'some'"),
        (lambda: fused_reverse_kl(*good, backend="magic"), "backend: 'magic'; expected 'auto' or one of reference"),
        (lambda: fused_reverse_kl(student.to("meta"), weight, teacher), "student_weight: on cpu; expected meta"),
        (lambda: fused_policy_reverse_kl(*good, None, tokens, baseline="v"), "baseline: 'v'"),
        (lambda: fused_policy_reverse_kl(*good, None, tokens[:-1]), r"tokens: torch.int64 \(36,\)"),
        (lambda: fused_log_prob(student, weight, tokens + V), "tokens: from 301 to 301; expected 0 to 300"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_second_derivatives_are_refused():
    student, weight, teacher, _ = make_inputs(0.3)
    h = student.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused_reverse_kl(h, weight, teacher), h, create_graph=True)
