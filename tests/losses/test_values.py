"""Divergences between the forward and the reverse KL, and what clips them, beside autograd."""

import pytest
import torch

from opsdl.losses import fused_reverse_kl, reference
from tests.support.losses import SMALL_SHAPE, assert_close, leaves, small_inputs

N, _, _ = SMALL_SHAPE


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5])
def test_gradcheck_of_other_divergences(beta):
    student, weight, teacher, teacher_weight, *_ = small_inputs()
    second = teacher[:3, :4], teacher_weight[:11, :4]
    call = lambda h, w: fused_reverse_kl(h, w, *second, beta=beta, temperature=0.8)  # noqa: E731
    torch.autograd.gradcheck(call, leaves(student[:3, :4], weight[:11, :4]))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_divergences_against_autograd(beta, clipped, scale):
    """Scale 60: tokens whose teacher likes what the student has dropped, by up to several hundred nats."""
    student, weight, teacher, teacher_weight, *_ = small_inputs()
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
