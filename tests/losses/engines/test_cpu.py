"""The engine in C++: accuracy in bf16 down to KL 1e-7, blocks, dtypes, skipping."""

import pytest
import torch

from opsdl.losses import fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl
from opsdl.losses.engines import cpu as cpu_engine
from tests.support.losses import has, relative

pytestmark = pytest.mark.skipif(not has("cpu"), reason="no C++ extension for this CPU")
N, H, V = 150, 64, 700


def make_inputs(dtype=torch.bfloat16, apart=0.3, tokens=N, size=H, vocabulary=V):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    student = draw(tokens, size)
    weight = draw(vocabulary, size) * 2.5 / size**0.5
    return [x.to(dtype) for x in (student, weight, student + apart * draw(tokens, size))]


def gradients(student, weight, teacher, *more, **options):
    """[loss, dHidden, dWeight, each of the stats]."""
    h, w = (x.detach().clone().requires_grad_() for x in (student, weight))
    loss, stats = fused_reverse_kl(h, w, teacher, *more, return_stats=True, **({"backend": "cpu"} | options))
    return [loss.detach(), *torch.autograd.grad(loss.sum(), (h, w)), *stats.values()]


def exact(student, weight, teacher):
    """KL [N], dHidden and dWeight of its mean, in float64, with the centred sum that keeps its digits at KL 1e-7."""
    h, w, difference = (x.double() for x in (student, weight, student.double() - teacher.double()))
    p, gap = (h @ w.T).softmax(-1), difference @ w.T
    centred = gap - (p * gap).sum(-1, keepdim=True)
    residual = torch.where(centred.abs() < 1e-2, centred**2 / 2 - centred**3 / 6 + centred**4 / 24 - centred**5 / 120,
                           torch.expm1(-centred) + centred)  # fmt: skip
    grad = p * centred / len(h)
    return torch.log1p((p * residual).sum(-1)), grad @ w, grad.T @ h


@pytest.mark.parametrize("target", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_bf16_accuracy_at_any_kl(target):
    """The teacher's hidden states differ in some numbers only where bf16 cannot hold a smaller difference of all."""
    student, weight, _ = make_inputs()
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(N, H, generator=generator)
    low, high = 1e-9, 10.0
    for _ in range(60):  # a KL near the target; each number is moved by at least the spacing of bf16, or not at all
        apart = (low * high) ** 0.5
        size = (apart * noise).abs() / student.float().abs().clamp(min=1e-3)
        chance = (size * 2**8).clamp(max=1)
        moved = torch.rand(N, H, generator=torch.Generator().manual_seed(9)) < chance
        step = torch.where(size * 2**8 > 1, apart * noise, student.float() * 2**-7 * noise.sign())
        teacher = torch.where(moved, student.float() + step, student.float()).bfloat16()
        kl, true_h, true_w = exact(student, weight, teacher)
        low, high = (apart, high) if kl.mean() < target else (low, apart)
    assert 0.5 * target < kl.mean() < 2 * target
    _, grad_h, grad_w, got_kl, *_ = gradients(student, weight, teacher)
    limit = 0.003 if target >= 1e-5 else 0.004
    assert relative(grad_h, true_h) <= limit and relative(grad_w, true_w) <= limit
    some = kl > 0
    assert ((got_kl[some] / kl[some] - 1).abs() <= 1e-4).all() and (got_kl[~some] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_to_the_bit(dtype):
    inputs = make_inputs(dtype)
    first = gradients(*inputs)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(gradients(*inputs), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("skip_tolerance", [None, 0.05])
def test_several_blocks_equal_one(dtype, skip_tolerance, monkeypatch):
    student, weight, teacher = make_inputs(dtype)
    mask = torch.arange(N) % 9 > 0
    options = dict(mask=mask, skip_tolerance=skip_tolerance)
    one = gradients(student, weight, teacher, **options)
    blocks, allocate, accumulate = [], cpu_engine.CpuEngine._allocate, cpu_engine.CpuEngine.accumulate

    def small(engine, count):
        engine.block, engine.only_block = cpu_engine.PANEL, False
        allocate(engine, count)

    def counted(engine, kept_sn):
        blocks.append(len(engine.index_n))
        accumulate(engine, kept_sn)

    monkeypatch.setattr(cpu_engine.CpuEngine, "_allocate", small)
    monkeypatch.setattr(cpu_engine.CpuEngine, "accumulate", counted)
    several = gradients(student, weight, teacher, **options)
    assert len(blocks) == 3 and max(blocks) == cpu_engine.PANEL
    # Skipping is decided block by block.
    tolerance = 0.1 if skip_tolerance else {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    for x, y in list(zip(several, one, strict=True))[: 3 if skip_tolerance else None]:
        assert relative(x, y) <= tolerance


@pytest.mark.parametrize("sizes", [(33, 33), (64, 31), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_odd_sizes_and_fp16_stay_right(sizes, dtype):
    student, weight, teacher = make_inputs(dtype, tokens=70, size=sizes[0])
    own = ()
    if sizes[0] != sizes[1]:
        teacher, own = make_inputs(dtype, tokens=70, size=sizes[1])[2], (make_inputs(dtype, size=sizes[1])[1],)
    got = gradients(student, weight, teacher, *own)
    expected = gradients(*(x.double() for x in (student, weight, teacher)), *(x.double() for x in own), backend="torch")
    rounding = torch.finfo(dtype).eps
    assert relative(got[1], expected[1]) < rounding and relative(got[2], expected[2]) < rounding
    assert relative(got[3], expected[3]) < 1e-5


def test_a_wide_head_under_autocast():
    student, weight, teacher = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, grad_h, grad_w, kl, *_ = gradients(student, weight, teacher)
    true_kl, true_h, true_w = exact(*(x.bfloat16() for x in (student, weight, teacher)))
    assert grad_h.dtype == grad_w.dtype == torch.float32
    assert relative(grad_h, true_h) < 0.004 and relative(grad_w, true_w) < 0.004
    assert relative(kl, true_kl) < 1e-5


@pytest.mark.parametrize("loss_name", ["kl", "policy", "log_prob"])
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("tolerance", [0.02, 0.2])
def test_skipping_keeps_its_promise(loss_name, softcap, tolerance):
    """The promise is for the logits; with an orthonormal head, the gradient for the hidden states has that norm."""
    size = 96
    student, _, _ = make_inputs(torch.float32, size=size)
    weight = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(4)))[0] * 3
    spread = torch.logspace(-3, 0, N)[:, None]
    teacher = student + spread * torch.randn(N, size, generator=torch.Generator().manual_seed(5))
    tokens = (student @ weight.T).argmax(-1)
    gradient = []
    for skip_tolerance in (None, tolerance):
        h, w = (x.clone().requires_grad_() for x in (student, weight))
        options = dict(skip_tolerance=skip_tolerance, backend="cpu", softcap=softcap, return_stats=True)
        if loss_name == "kl":
            loss, stats = fused_reverse_kl(h, w, teacher, **options)
        elif loss_name == "policy":
            loss, stats = fused_policy_reverse_kl(h, w, teacher, None, tokens, **options)
        else:
            sharp = h * torch.logspace(-1, 1, N)[:, None]
            loss, stats = fused_log_prob(sharp, w, tokens, reduction="mean", **options)
        loss.backward()
        gradient.append(h.grad.double() if loss_name != "log_prob" else h.grad / torch.logspace(-1, 1, N)[:, None])
    skipped = stats["skipped"] == 1  # the vocabulary is one tile, so a token is skipped as a whole
    assert 0.02 < skipped.float().mean() < 0.98
    assert gradient[1][skipped].norm() <= 1e-5 * gradient[0].norm() and gradient[1][~skipped].abs().amax(-1).all()
    assert relative(gradient[1], gradient[0]) <= tolerance + 1e-4
    # As many as the promise allows: one more bin of the energies, 1/16 wide, would break it.
    energy = gradient[0].square().sum(-1)
    more = energy <= energy[~skipped].min() * (1 + 1 / 16)
    assert energy[skipped | more].sum() > (1 - 1e-3) * tolerance**2 * energy.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_token_skipped(dtype):
    student, weight, _ = make_inputs(dtype)
    loss, grad_h, grad_w, *_ = gradients(student, weight, student.clone(), skip_tolerance="auto")
    assert not loss.any() and not grad_h.any() and not grad_w.any()


@pytest.mark.parametrize("loss_name", ["kl", "policy", "log_prob"])
@pytest.mark.parametrize("wanted", range(1, 8))
def test_wanted_subsets(loss_name, wanted):
    student, weight, teacher = make_inputs(torch.float32, tokens=70)
    tokens, bias = torch.arange(70) * 10, torch.randn(V, generator=torch.Generator().manual_seed(6))

    def gradient(chosen):
        h, w, b = (
            x.detach().clone().requires_grad_(bool(chosen >> i & 1)) for i, x in enumerate((student, weight, bias))
        )
        if loss_name == "kl":
            loss = fused_reverse_kl(h, w, teacher, student_bias=b, backend="cpu")
        elif loss_name == "policy":
            loss = fused_policy_reverse_kl(h, w, teacher, None, tokens, student_bias=b, backend="cpu")
        else:
            loss = fused_log_prob(h, w, tokens, bias=b, backend="cpu").sum()
        loss.backward()
        return [x.grad for x in (h, w, b)]

    for i, (x, y) in enumerate(zip(gradient(wanted), gradient(7), strict=True)):
        assert torch.equal(x, y) if wanted >> i & 1 else x is None
