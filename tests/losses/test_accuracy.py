"""The losses against float64 at KL from 1 down to 1e-7, in every dtype, and with what a skip_tolerance promises."""

import pytest
import torch

from opsdl.losses import fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl, reference
from tests.support.losses import DTYPES, PAIR_SHAPE, has, make_pair, relative

_, H, _ = PAIR_SHAPE
ENGINES = [name for name in ("torch", "cpu") if has(name)]


def truth(student_NH, weight_VH, teacher_NH, teacher_VH, loss=None):
    """Per-token KL and the gradients of its mean, in float64, from the very same (rounded) inputs."""
    h, w = (x.double().requires_grad_() for x in (student_NH, weight_VH))
    z, z_teacher = h @ w.T, teacher_NH.double() @ teacher_VH.double().T
    kl = reference.reverse_kl(z, z_teacher)
    kl.mean().backward()
    return kl.detach(), h.grad, w.grad


@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize("noise", [0.6, 0.05, 4e-3, 4e-4, 1.2e-4])
def test_accuracy_at_any_kl(noise, shared):
    student, weight, teacher, _ = make_pair(noise)
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
@pytest.mark.parametrize("engine, roundings", [("torch", 1), ("cpu", 2)][: len(ENGINES)])
@pytest.mark.parametrize("noise", [0.6, 0.05, 4e-3, 4e-4])
def test_bf16_inputs_cost_only_the_rounding_of_the_gradient(noise, engine, roundings):
    student, weight, teacher, _ = make_pair(noise, torch.bfloat16)
    if (student == teacher).all():
        pytest.fail("noise too small for bf16: nothing to test")
    expected_kl, expected_h, expected_w = truth(student, weight, teacher, weight)
    h, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, stats = fused_reverse_kl(h, w, teacher, return_stats=True, backend=engine)
    loss.backward()
    rounding = [relative(x.bfloat16(), x) for x in (expected_h, expected_w)]
    assert h.grad.dtype == torch.bfloat16
    assert relative(h.grad, expected_h) <= 1.2 * roundings**0.5 * rounding[0]
    assert relative(w.grad, expected_w) <= 1.2 * roundings**0.5 * rounding[1]
    assert relative(stats["kl"], expected_kl) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tolerance", [0.3, 0.01, "auto"])
def test_skipped_tokens_keep_the_promised_accuracy(tolerance, engine):
    student, weight, _, _ = make_pair(0.3, torch.bfloat16, tokens=200)
    spread = torch.logspace(-4, 0, 200)[:, None]  # from converged tokens to far ones, as in real training
    teacher = (student.float() + spread * torch.randn(200, H, generator=torch.Generator().manual_seed(5))).bfloat16()
    gradients = []
    for skip_tolerance in (None, tolerance):
        h, w = (x.float().requires_grad_() for x in (student, weight))
        h16, w16 = h.bfloat16(), w.bfloat16()  # the gradient arrives rounded once either way
        loss, stats = fused_reverse_kl(
            h16, w16, teacher, skip_tolerance=skip_tolerance, return_stats=True, backend=engine
        )
        gradients.append(torch.autograd.grad(loss, (h, w)))
    bound = torch.finfo(torch.bfloat16).eps / 20 if tolerance == "auto" else tolerance
    assert 0.02 < stats["skipped"].mean() < 0.98
    # The bound is on dlogits; the products with head and hidden states spread errors about as they spread the signal.
    for exact, got in zip(*gradients, strict=True):
        assert relative(got, exact) < 2 * bound + 0.003


@pytest.mark.parametrize("loss", ["log_prob", "policy", "kl"])
def test_exact_large_logits_cost_no_digits(loss, backend):
    """Logits of 3000 that float32 holds exactly: only their differences matter."""
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randint(-40, 0, (2, 300), generator=generator).double() / 4).index_fill(1, torch.tensor([7]), 3.0)
    weight, teacher_weight = (3000 + logits)[..., None]
    one, token, results = torch.ones(1, 1, dtype=torch.float64), torch.tensor([7]), []
    for dtype, name in ((torch.float64, "reference"), (DTYPES[backend], backend)):
        w, options = weight.to(dtype).requires_grad_(), dict(backend=name, return_stats=True)
        pair = one.to(dtype), w, one.to(dtype), teacher_weight.to(dtype)
        if loss == "log_prob":
            value, stats = fused_log_prob(*pair[:2], token, **options)
        elif loss == "policy":
            value, stats = fused_policy_reverse_kl(*pair, token, **options)
        else:
            value, stats = fused_reverse_kl(*pair, **options)
        (gradient,) = torch.autograd.grad(value.sum(), w)
        results.append([value.detach(), gradient, stats["entropy"]])
    for got, expected in zip(results[1], results[0], strict=True):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()
