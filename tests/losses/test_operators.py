"""The losses as operators: torch's own checks, torch.compile, checkpointing, and backwards of every kind."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from opsdl.losses import fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl
from opsdl.losses.call import Call, Wanted
from opsdl.losses.values import Value
from tests.support.losses import DTYPES, TOLERANCE, assert_close, leaves, small_inputs

LOSSES = ["kl", "policy", "log_prob"]


def every_loss(backend, **options):
    """{name: function of hidden states and head}."""
    student, _, teacher, teacher_weight, bias, tokens, mask = small_inputs(DTYPES[backend])
    options = dict(mask=mask, backend=backend, return_stats=True) | options
    return {
        "kl": lambda h, w: fused_reverse_kl(h, w, teacher, tokens=tokens, student_bias=bias, **options),
        "policy": lambda h, w: fused_policy_reverse_kl(h, w, teacher, teacher_weight, tokens, **options),
        "log_prob": lambda h, w: fused_log_prob(h, w, tokens, bias=bias, **options),
    }


@pytest.mark.parametrize("value", [Value.KL, Value.POLICY, Value.LOG_PROB])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["reduced_loss", "token_losses"])
def test_opcheck(name, value, transposed, backend):
    student, weight, teacher, teacher_weight, bias, tokens, mask = small_inputs(DTYPES[backend])
    student = student.T.contiguous().T if transposed else student
    h, w, b = (x.detach().requires_grad_() for x in (student, weight, bias))
    call = Call(
        hidden_NH=h, weight_VH=w, bias_V=b, teacher_hidden_NK=None if value is Value.LOG_PROB else teacher,
        teacher_weight_VK=teacher_weight if value is Value.POLICY else None, teacher_bias_V=None, tokens_N=tokens,
        scale_N=mask.to(h.dtype), value=value, temperature=1.0, softcap=None, beta=1.0, clip=None, skip_tolerance=0.0,
        vocab_size=len(w), group="", backend=backend, wanted=Wanted(True, True, True), yielded=False,
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(getattr(torch.ops.opsdl, name).default, call.flat(), test_utils=tests)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_equals_eager(loss, reduction, backend):
    student, weight, *_ = small_inputs(DTYPES[backend])
    loss = every_loss(backend, reduction=reduction)[loss]
    results = []
    torch._dynamo.reset()
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        h, w = leaves(student, weight)
        value, stats = call(h, w)
        value.square().sum().backward()
        results.append([value.detach(), h.grad, w.grad, *stats.values()])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing_changes_nothing(reduction, backend):
    student, weight, *_ = small_inputs(DTYPES[backend])
    results = []
    for wrapped in (False, True):
        h, w = leaves(student, weight)
        loss = every_loss(backend, reduction=reduction, return_stats=False)["kl"]
        call = lambda h, w, loss=loss: loss(h.tanh(), w) * 3  # noqa: E731
        value = checkpoint(call, h, w, use_reentrant=False) if wrapped else call(h, w)
        value.sum().backward()
        results.append([value.detach(), h.grad, w.grad])
    assert_close(results[1], results[0], rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(loss, reduction, backend):
    student, weight, *_ = small_inputs(DTYPES[backend])
    h, w = leaves(student, weight)
    value = every_loss(backend, reduction=reduction, return_stats=False)[loss](h, w).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, (h, w), create_graph=True)


def test_gradgradcheck_is_refused():
    student, weight, teacher, *_ = small_inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.gradgradcheck(lambda h: fused_reverse_kl(h, weight, teacher), leaves(student))


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kept_graph_gives_the_same_gradient_again(upstream, reduction, backend):
    student, weight, *_ = small_inputs(DTYPES[backend])
    h, w = leaves(student, weight)
    value = every_loss(backend, reduction=reduction, return_stats=False)["kl"](h, w).sum()
    grad = torch.tensor(upstream, dtype=value.dtype)
    value.backward(grad, retain_graph=True)
    first = [h.grad.clone(), w.grad.clone()]
    for _ in range(2):  # an optimiser may change .grad in place between backwards
        h.grad.zero_(), w.grad.zero_()
        value.backward(grad, retain_graph=True)
        assert_close((h.grad, w.grad), first, rtol=0)
    value.backward(grad)
    assert_close((h.grad, w.grad), [2 * x for x in first], rtol=0)


def test_two_graphs_in_flight(backend):
    student, weight, *_ = small_inputs(DTYPES[backend])
    losses = every_loss(backend, reduction="sum", return_stats=False)
    alone = []
    for name in ("kl", "log_prob"):
        h, w = leaves(student, weight)
        alone.append(torch.autograd.grad(losses[name](h, w) * 0.3, (h, w)))
    h, w = leaves(student, weight)
    first, second = losses["kl"](h, w), losses["log_prob"](h, w)
    (0.3 * (second + first)).backward()
    assert_close((h.grad, w.grad), [x + y for x, y in zip(*alone, strict=True)], TOLERANCE[backend])


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_the_wanted_gradients(wanted, backend):
    student, weight, teacher, teacher_weight, bias, tokens, mask = small_inputs(DTYPES[backend])
    inputs = [x.clone().requires_grad_() for x in (student, weight, bias)]

    def loss(h, w, b):
        return fused_reverse_kl(h, w, teacher, teacher_weight, student_bias=b, teacher_bias=bias, backend=backend)

    expected = torch.autograd.grad(loss(*inputs), inputs)
    some = [x.detach().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(inputs)]
    loss(*some).backward()
    for x, y in zip(some, expected, strict=True):
        assert (x.grad is None) != x.requires_grad
        if x.requires_grad:
            assert_close([x.grad], [y], TOLERANCE[backend])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_keeps_the_dtype_of_each_gradient(reduction):
    student, weight, teacher, *_ = small_inputs(torch.float32)
    h, w = leaves(student, weight)
    with torch.autocast("cpu", torch.bfloat16):
        value = fused_reverse_kl(h, w, teacher, reduction=reduction)
    value.sum().backward()  # as usual, outside
    rounded = [x.bfloat16().float() for x in (student, weight, teacher)]
    h32, w32 = leaves(*rounded[:2])
    fused_reverse_kl(h32, w32, rounded[2], reduction=reduction).sum().backward()
    for x, y in ((h, h32), (w, w32)):
        assert x.grad.dtype == torch.float32
        assert (x.grad - y.grad).norm() < 0.01 * y.grad.norm()
