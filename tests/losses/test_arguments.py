"""Every wrong argument is refused in a line that names it."""

import pytest
import torch

from opsdl.losses import fused_log_prob, fused_policy_reverse_kl, fused_reverse_kl
from opsdl.losses.backends import choose
from tests.support.losses import PAIR_SHAPE, SMALL_SHAPE, has, make_pair, small_inputs


def assert_refused(cases):
    """Every call raises ValueError with its message; all that do not are named at once."""
    wrong = []
    for call, message in cases:
        try:
            with pytest.raises(ValueError, match=message):
                call()
        except (Exception, pytest.fail.Exception) as error:
            wrong.append(f"{message}: {type(error).__name__} {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def test_wrong_shapes_and_values():
    N, _, V = PAIR_SHAPE
    student, weight, teacher, teacher_weight = make_pair(0.3)
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
    assert_refused(cases)


def test_wrong_options_dtypes_and_devices():
    N, _, V = SMALL_SHAPE
    student, weight, teacher, teacher_weight, bias, tokens, mask = small_inputs(torch.float32)
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
    if has("cpu"):
        cases += [
            (lambda: kl(beta=0.5, backend="cpu"), "beta: 0.5 with backend 'cpu'; expected 1 there, or backend 'torch'"),
            (lambda: fused_reverse_kl(*f64, backend="cpu"), "student_hidden: torch.float64 with backend 'cpu'"),
            (
                lambda: choose("cpu", torch.float32, meta.device, 1.0, None),
                "backend: 'cpu' cannot take tensors on meta",
            ),
        ]
    assert_refused(cases)
