"""The losses in torch: operators, torch.compile, checkpointing, second derivatives, DTensor, modules, errors."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.utils.checkpoint import checkpoint

from opsdl.losses import (
    FusedLogProb,
    FusedPolicyReverseKL,
    FusedReverseKL,
    available_backends,
    fused_log_prob,
    fused_policy_reverse_kl,
    fused_reverse_kl,
    reference,
)
from opsdl.losses.backends import choose

N, H, V = 9, 6, 150
DTYPES = {"cpu": torch.float32, "torch": torch.float64}


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    if available_backends()[request.param] != "available":
        pytest.skip(available_backends()[request.param])
    return request.param


def make_inputs(dtype=torch.float64, seed=0):
    """(student hidden, head, teacher hidden, teacher head, bias, tokens, mask)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    student = draw(N, H)
    tokens, mask = torch.randint(V, (N,), generator=generator), torch.rand(N, generator=generator) < 0.7
    return student, draw(V, H), student + 0.3 * draw(N, H), draw(V, H), draw(V), tokens, mask


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def assert_close(got, expected, rtol=1e-9):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * 1e-2)


TOLERANCE = {"cpu": 1e-4, "torch": 1e-9}


def every_loss(backend, **options):
    """{kind: function of hidden states and head}."""
    student, _, teacher, teacher_weight, bias, tokens, mask = make_inputs(DTYPES[backend])
    options = dict(mask=mask, backend=backend, return_stats=True) | options
    return {
        "kl": lambda h, w: fused_reverse_kl(h, w, teacher, tokens=tokens, student_bias=bias, **options),
        "policy": lambda h, w: fused_policy_reverse_kl(h, w, teacher, teacher_weight, tokens, **options),
        "log_prob": lambda h, w: fused_log_prob(h, w, tokens, bias=bias, **options),
    }


@pytest.mark.parametrize("kind", ["kl", "policy", "log_prob"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["reduced_loss", "token_losses"])
def test_opcheck(name, kind, transposed, backend):
    student, weight, teacher, teacher_weight, bias, tokens, mask = make_inputs(DTYPES[backend])
    student = student.T.contiguous().T if transposed else student
    h, w, b = (x.detach().requires_grad_() for x in (student, weight, bias))
    second = (None,) * 3 if kind == "log_prob" else (teacher, None if kind == "kl" else teacher_weight, None)
    scale, skip_tolerance = mask.to(h.dtype), 0.0
    arguments = (
        h, w, b, *second, tokens, scale, kind, 1.0, None, 1.0, None, skip_tolerance, V, "", backend, [True] * 3,
    )  # fmt: skip
    arguments = (*arguments, False) if name == "reduced_loss" else arguments
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(getattr(torch.ops.opsdl, name).default, arguments, test_utils=tests)


@pytest.mark.parametrize("kind", ["kl", "policy", "log_prob"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_equals_eager(kind, reduction, backend):
    student, weight, *_ = make_inputs(DTYPES[backend])
    loss = every_loss(backend, reduction=reduction)[kind]
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
    student, weight, *_ = make_inputs(DTYPES[backend])
    results = []
    for wrapped in (False, True):
        h, w = leaves(student, weight)
        loss = every_loss(backend, reduction=reduction, return_stats=False)["kl"]
        call = lambda h, w, loss=loss: loss(h.tanh(), w) * 3  # noqa: E731
        value = checkpoint(call, h, w, use_reentrant=False) if wrapped else call(h, w)
        value.sum().backward()
        results.append([value.detach(), h.grad, w.grad])
    assert_close(results[1], results[0], rtol=0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck_of_log_prob_with_weights(reduction):
    student, weight, _, _, bias, tokens, mask = make_inputs()
    options = dict(mask=mask[:3], token_weights=bias[:3], reduction=reduction, softcap=4.0)
    call = lambda h, w, b: fused_log_prob(h, w, tokens[:3] % 11, bias=b, **options)  # noqa: E731
    torch.autograd.gradcheck(call, leaves(student[:3, :4], weight[:11, :4], bias[:11]))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5])
def test_gradcheck_of_other_divergences(beta):
    student, weight, teacher, teacher_weight, *_ = make_inputs()
    second = teacher[:3, :4], teacher_weight[:11, :4]
    call = lambda h, w: fused_reverse_kl(h, w, *second, beta=beta, temperature=0.8)  # noqa: E731
    torch.autograd.gradcheck(call, leaves(student[:3, :4], weight[:11, :4]))


@pytest.mark.parametrize("kind", ["kl", "policy", "log_prob"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused_everywhere(kind, reduction, backend):
    student, weight, *_ = make_inputs(DTYPES[backend])
    h, w = leaves(student, weight)
    value = every_loss(backend, reduction=reduction, return_stats=False)[kind](h, w).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, (h, w), create_graph=True)


def test_gradgradcheck_is_refused():
    student, weight, teacher, *_ = make_inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.gradgradcheck(lambda h: fused_reverse_kl(h, weight, teacher), leaves(student))


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kept_graph_gives_the_same_gradient_again(upstream, reduction, backend):
    student, weight, *_ = make_inputs(DTYPES[backend])
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
    student, weight, *_ = make_inputs(DTYPES[backend])
    losses = every_loss(backend, reduction="sum", return_stats=False)
    alone = []
    for kind in ("kl", "log_prob"):
        h, w = leaves(student, weight)
        alone.append(torch.autograd.grad(losses[kind](h, w) * 0.3, (h, w)))
    h, w = leaves(student, weight)
    first, second = losses["kl"](h, w), losses["log_prob"](h, w)
    (0.3 * (second + first)).backward()
    assert_close((h.grad, w.grad), [x + y for x, y in zip(*alone, strict=True)], TOLERANCE[backend])


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_the_wanted_gradients(wanted, backend):
    student, weight, teacher, teacher_weight, bias, tokens, mask = make_inputs(DTYPES[backend])
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
    student, weight, teacher, *_ = make_inputs(torch.float32)
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


def test_hidden_states_and_head_of_two_dtypes():
    student, weight, teacher, *_ = make_inputs(torch.float32)
    for pair in ((torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float32)):
        h, w, t = student.to(pair[0]), weight.to(pair[1]), teacher.to(pair[0])
        leaf_h, leaf_w = leaves(h, w)
        value, stats = fused_reverse_kl(leaf_h, leaf_w, t, return_stats=True)
        expected = fused_reverse_kl(h.double(), w.double(), t.double())
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        value.backward()
        assert (leaf_h.grad.dtype, leaf_w.grad.dtype) == pair


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_divergences_against_autograd(beta, clipped, scale):
    """Scale 60: tokens whose teacher likes what the student has dropped, by up to several hundred nats."""
    student, weight, teacher, teacher_weight, *_ = make_inputs()
    every = reference.divergence(student * scale @ weight.T, teacher @ teacher_weight.T, beta)
    clip = float(every.sort().values[N // 2 : N // 2 + 2].mean()) if clipped else None  # half above
    results = []
    for formula in (True, False):
        h, w = leaves(student * scale, weight)
        if formula:
            z, z_teacher = h @ w.T, teacher @ teacher_weight.T
            value = reference.divergence(z, z_teacher, beta)
            value = value if clip is None else value.clamp(max=clip)
        else:
            value = fused_reverse_kl(h, w, teacher, teacher_weight, beta=beta, clip=clip, reduction="none")
        results.append([value.detach(), *torch.autograd.grad(value.mean(), (h, w))])
    assert_close(*results)
    if clipped:
        assert (results[1][0] == clip).sum() == N - N // 2 - 1


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_confident_student_and_an_undecided_teacher(beta):
    """The teacher's half on an entry that exp(-100) drops from float32 and 1e-44 hides in float64."""
    one, student, teacher = (torch.tensor(x, dtype=torch.float64) for x in ([[1.0]], [[0.0], [-100]], [[0.0], [0]]))
    h, w = leaves(one, student)
    got = fused_reverse_kl(h, w, one, teacher, beta=beta)
    expected = reference.divergence(h @ w.T, teacher.T, beta).mean()
    assert_close(
        [got.detach(), *torch.autograd.grad(got, (h, w))], [expected.detach(), *torch.autograd.grad(expected, (h, w))]
    )
    if beta == 1:
        for backend in ("auto", "torch"):
            value = fused_reverse_kl(one.float(), student.float(), one.float(), teacher.float(), backend=backend)
            assert value.item() == pytest.approx(0.6931472, rel=1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_padding_by_bias_is_padding_by_vocab_size(softcap, backend):
    student, weight, teacher, _, bias, *_ = make_inputs(DTYPES[backend])
    hole = bias.clone()
    hole[-30:] = -torch.inf
    for loss_backend in (backend, "reference"):
        options = dict(softcap=softcap, return_stats=True, backend=loss_backend)
        padded = fused_reverse_kl(student, weight, teacher, student_bias=hole, **options)
        cut = fused_reverse_kl(student, weight, teacher, student_bias=bias, vocab_size=V - 30, **options)
        assert_close([padded[0], *padded[1].values()], [cut[0], *cut[1].values()], TOLERANCE[backend])


def test_a_nan_in_the_head_reaches_every_loss(backend):
    student, weight, teacher, _, _, tokens, _ = make_inputs(DTYPES[backend])
    weight[V // 2] = torch.nan
    tokens[:] = 0
    assert fused_log_prob(student, weight, tokens, backend=backend).isnan().all()
    assert fused_reverse_kl(student, weight, teacher, backend=backend).isnan()


def test_modules_equal_functions():
    student, weight, teacher, teacher_weight, bias, tokens, mask = make_inputs()
    options, tensors = dict(temperature=1.3, reduction="sum", softcap=9.0), dict(mask=mask)
    kl, policy, log_prob = (loss(**options) for loss in (FusedReverseKL, FusedPolicyReverseKL, FusedLogProb))
    pair = student, weight, teacher, teacher_weight
    assert torch.equal(kl(*pair, **tensors), fused_reverse_kl(*pair, **tensors, **options))
    assert torch.equal(policy(*pair, tokens, **tensors), fused_policy_reverse_kl(*pair, tokens, **tensors, **options))
    expected = fused_log_prob(student, weight, tokens, bias=bias, **tensors, **options)
    assert torch.equal(log_prob(student, weight, tokens, bias=bias, **tensors), expected)
    assert "temperature=1.3" in repr(kl) and not list(policy.parameters())


def test_errors_name_the_argument():
    student, weight, teacher, teacher_weight, bias, tokens, mask = make_inputs(torch.float32)
    kl = lambda *more, **options: fused_reverse_kl(student, weight, teacher, *more, **options)  # noqa: E731
    meta, f64 = bias.to("meta"), [x.double() for x in (student, weight, teacher)]
    cases = [
        (lambda: kl(beta=1.5), r"beta: 1.5; expected 0 \(forward KL\) to 1"),
        (lambda: kl(beta=-0.1), "beta: -0.1"),
        (lambda: kl(beta=float("nan")), "beta: nan"),
        (lambda: kl(clip=0.0), "clip: 0.0; expected None or a positive number"),
        (lambda: kl(vocab_size=0), "vocab_size: 0; expected 1 to 150, the rows of student_weight"),
        (lambda: kl(vocab_size=V + 1), "vocab_size: 151"),
        (lambda: kl(teacher_weight[:99], vocab_size=100), "vocab_size: 100; expected 1 to 99, the rows of teacher_w"),
        (lambda: kl(vocab_size=V, vocab_group=object()), "vocab_size: given with vocab_group"),
        (lambda: kl(backend="reference", vocab_group=object()), "vocab_group: given with backend 'reference'"),
        (lambda: kl(beta=0.5, backend="cpu"), "beta: 0.5 with backend 'cpu'; expected 1 there, or backend 'torch'"),
        (lambda: fused_reverse_kl(*f64, backend="cpu"), "student_hidden: torch.float64 with backend 'cpu'"),
        (lambda: choose("cpu", torch.float32, meta.device, 1.0, None), "backend: 'cpu' cannot take tensors on meta"),
        (lambda: fused_reverse_kl(student, weight, teacher.long()), "teacher_hidden: torch.int64"),
        (lambda: fused_reverse_kl(student, weight.long(), teacher), "student_weight: torch.int64"),
        (lambda: kl(student_bias=bias.long()), "student_bias: torch.int64"),
        (lambda: kl(student_bias=meta), "student_bias: on meta; expected cpu"),
        (lambda: kl(teacher_weight, teacher_bias=meta), "teacher_bias: on meta; expected cpu"),
        (lambda: kl(mask=mask.to("meta")), "mask: on meta; expected cpu"),
        (lambda: kl(token_weights=meta[:N]), "token_weights: on meta; expected cpu"),
        (lambda: fused_log_prob(student, weight, tokens.to("meta")), "tokens: on meta; expected cpu"),
        (lambda: fused_log_prob(student, weight, tokens.int()), "tokens: torch.int32"),
        (lambda: fused_log_prob(student, weight, tokens - V), "tokens: from"),
        (lambda: fused_log_prob(student, weight, tokens + V, backend="reference"), "tokens: from"),
        (lambda: fused_reverse_kl(student, weight, None), "teacher_hidden: None"),
        (lambda: kl(softcap=float("inf")), "softcap: inf"),
        (lambda: kl(temperature=float("nan")), "temperature: nan"),
    ]
    wrong = []
    for call, message in cases:
        try:
            with pytest.raises(ValueError, match=message):
                call()
        except (Exception, pytest.fail.Exception) as error:
            wrong.append(f"{message}: {type(error).__name__} {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def sharded_head(rank, folder):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    student, weight, teacher, *_ = make_inputs()
    h, w = leaves(student, weight)
    expected = fused_reverse_kl(h, w, teacher)
    expected.backward()
    mesh = init_device_mesh("cpu", (2,))
    head, h_sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_(), student.clone().requires_grad_()
    got = fused_reverse_kl(h_sharded, head, teacher)
    got.backward()
    assert head.grad.placements == (Shard(0),) and head.grad.to_local().shape[0] == V // 2
    got = [got.detach(), h_sharded.grad, head.grad.full_tensor()]
    assert_close(got, [expected.detach(), h.grad, w.grad])
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()


def test_dtensor_head(tmp_path):
    multiprocessing.spawn(sharded_head, (tmp_path,), nprocs=2)
    assert len(list(tmp_path.glob("done-*"))) == 2


@pytest.mark.parametrize("kind", ["log_prob", "policy", "kl"])
def test_exact_large_logits_cost_no_digits(kind, backend):
    """Logits of 3000 that float32 holds exactly: only their differences matter."""
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randint(-40, 0, (2, 300), generator=generator).double() / 4).index_fill(1, torch.tensor([7]), 3.0)
    weight, teacher_weight = (3000 + logits)[..., None]
    one, token, results = torch.ones(1, 1, dtype=torch.float64), torch.tensor([7]), []
    for dtype, name in ((torch.float64, "reference"), (DTYPES[backend], backend)):
        w, options = weight.to(dtype).requires_grad_(), dict(backend=name, return_stats=True)
        pair = one.to(dtype), w, one.to(dtype), teacher_weight.to(dtype)
        if kind == "log_prob":
            value, stats = fused_log_prob(*pair[:2], token, **options)
        elif kind == "policy":
            value, stats = fused_policy_reverse_kl(*pair, token, **options)
        else:
            value, stats = fused_reverse_kl(*pair, **options)
        (gradient,) = torch.autograd.grad(value.sum(), w)
        results.append([value.detach(), gradient, stats["entropy"]])
    for got, expected in zip(results[1], results[0], strict=True):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()
