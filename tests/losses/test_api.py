"""The public losses beside the formulas and autograd: options, shapes, masks, padding, extremes."""

import pytest
import torch

from opsdl.losses import fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl
from tests.support.losses import (
    DTYPES,
    PAIR_SHAPE,
    SMALL_SHAPE,
    TOLERANCE,
    assert_close,
    has,
    leaves,
    make_pair,
    small_inputs,
)

N, H, V = PAIR_SHAPE
BACKENDS = [name for name in ("reference", "torch", "cpu") if has(name)]


@pytest.mark.parametrize("softcap, temperature", [(None, 1.0), (None, 0.7), (8.0, 1.0), (8.0, 1.3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_agree_with_the_reference(softcap, temperature, bias, shared, reduction):
    size = H if shared else 16
    student, weight, teacher, teacher_weight = make_pair(0.3, torch.float64, teacher_hidden_size=size, tokens=24)
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
    student, weight, teacher, teacher_weight = make_pair(0.3, torch.float64)
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
    student, weight, teacher, _ = make_pair(0.3, torch.float64, tokens=1)
    h = student.clone().requires_grad_()
    fused_reverse_kl(h, weight, teacher).backward()
    every = student.expand(V, H).clone().requires_grad_()
    p = (student @ weight.T).softmax(-1)[0]
    fused_policy_reverse_kl(
        every, weight, teacher.expand(V, H), None, torch.arange(V), baseline=baseline, token_weights=p, reduction="sum"
    ).backward()
    assert torch.allclose(every.grad.sum(0), h.grad[0], rtol=1e-9, atol=1e-14)


def test_log_prob():
    student, weight, _, _ = make_pair(0.3, torch.float64)
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
    student, weight, teacher, teacher_weight = make_pair(0.3, torch.float64, tokens=3)
    student, weight, bias = student[:, :5].clone(), weight[:11, :5].clone(), torch.randn(11, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (student, weight, bias)]
    torch.autograd.gradcheck(
        lambda h, w, b: fused_reverse_kl(
            h, w, teacher, teacher_weight[:11], student_bias=b, softcap=5.0, temperature=0.8, reduction=reduction
        ),
        leaves,
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck_of_log_prob_with_weights(reduction):
    student, weight, _, _, bias, tokens, mask = small_inputs()
    options = dict(mask=mask[:3], token_weights=bias[:3], reduction=reduction, softcap=4.0)
    call = lambda h, w, b: fused_log_prob(h, w, tokens[:3] % 11, bias=b, **options)  # noqa: E731
    torch.autograd.gradcheck(call, leaves(student[:3, :4], weight[:11, :4], bias[:11]))


def test_teacher_gets_no_gradient():
    inputs = [x.requires_grad_() for x in make_pair(0.3)]
    student, weight, teacher, teacher_weight = inputs
    for backend in BACKENDS:
        for x in inputs:
            x.grad = None
        fused_reverse_kl(student, weight, teacher, teacher_weight, backend=backend).backward()
        assert teacher.grad is None and teacher_weight.grad is None and weight.grad.abs().sum() > 0
        fused_policy_reverse_kl(student, weight, teacher, None, torch.arange(N), backend=backend).backward()
        assert teacher.grad is None


def test_identical_student_and_teacher_give_exactly_zero():
    student, weight, _, _ = make_pair(0.3)
    h = student.clone().requires_grad_()
    for teacher_weight in (None, weight.clone()):
        loss = fused_reverse_kl(h, weight, student, teacher_weight)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, h)
        assert gradient.abs().max() == 0


def test_padded_vocabulary_and_extreme_logits():
    student, weight, teacher, _ = make_pair(0.3, torch.float64)
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


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_padding_by_bias_is_padding_by_vocab_size(softcap, backend):
    student, weight, teacher, _, bias, *_ = small_inputs(DTYPES[backend])
    hole = bias.clone()
    hole[-30:] = -torch.inf
    for loss_backend in (backend, "reference"):
        options = dict(softcap=softcap, return_stats=True, backend=loss_backend)
        padded = fused_reverse_kl(student, weight, teacher, student_bias=hole, **options)
        cut = fused_reverse_kl(student, weight, teacher, student_bias=bias, vocab_size=SMALL_SHAPE[2] - 30, **options)
        assert_close([padded[0], *padded[1].values()], [cut[0], *cut[1].values()], TOLERANCE[backend])


def test_masked_tokens_may_hold_anything():
    student, weight, teacher, _ = make_pair(0.3)
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
    student, weight, teacher, _ = make_pair(0.3)
    expected = fused_reverse_kl(student, weight, teacher)
    strided = fused_reverse_kl(student.T.contiguous().T, weight.repeat(1, 2)[:, :H], teacher)
    assert torch.allclose(strided, expected)
    rounded = fused_reverse_kl(student.bfloat16(), weight.bfloat16(), teacher.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_reverse_kl(student, weight, teacher), rounded)
    nothing = fused_reverse_kl(student[:0], weight, teacher[:0], reduction="none")
    assert nothing.shape == (0,)
    assert fused_reverse_kl(student[:0], weight, teacher[:0]).item() == 0
    assert torch.allclose(fused_reverse_kl(student, weight, teacher, reduction="sum"), expected * N)


def test_hidden_states_and_head_of_two_dtypes():
    student, weight, teacher, *_ = small_inputs(torch.float32)
    for pair in ((torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float32)):
        h, w, t = student.to(pair[0]), weight.to(pair[1]), teacher.to(pair[0])
        leaf_h, leaf_w = leaves(h, w)
        value, stats = fused_reverse_kl(leaf_h, leaf_w, t, return_stats=True)
        expected = fused_reverse_kl(h.double(), w.double(), t.double())
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        value.backward()
        assert (leaf_h.grad.dtype, leaf_w.grad.dtype) == pair


def test_a_nan_in_the_head_reaches_every_loss(backend):
    student, weight, teacher, _, _, tokens, _ = small_inputs(DTYPES[backend])
    weight[len(weight) // 2] = torch.nan
    tokens[:] = 0
    assert fused_log_prob(student, weight, tokens, backend=backend).isnan().all()
    assert fused_reverse_kl(student, weight, teacher, backend=backend).isnan()


def test_frozen_parts_get_no_work():
    student, weight, teacher, _ = make_pair(0.3)
    h = student.clone().requires_grad_()
    fused_reverse_kl(h, weight, teacher).backward()
    assert h.grad is not None
    w = weight.clone().requires_grad_()
    fused_reverse_kl(student, w, teacher).backward()
    assert w.grad is not None
    assert not fused_reverse_kl(student, weight, teacher).requires_grad
