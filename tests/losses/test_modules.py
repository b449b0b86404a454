"""The losses as modules: the same numbers, and wrong options refused when they are made."""

import pytest
import torch

from opsdl.losses import (
    FusedLogProb,
    FusedPolicyReverseKL,
    FusedReverseKL,
    fused_log_prob,
    fused_policy_reverse_kl,
    fused_reverse_kl,
)
from tests.support.losses import small_inputs


def test_modules_equal_functions():
    student, weight, teacher, teacher_weight, bias, tokens, mask = small_inputs()
    options, tensors = dict(temperature=1.3, reduction="sum", softcap=9.0), dict(mask=mask)
    kl, policy, log_prob = (loss(**options) for loss in (FusedReverseKL, FusedPolicyReverseKL, FusedLogProb))
    pair = student, weight, teacher, teacher_weight
    assert torch.equal(kl(*pair, **tensors), fused_reverse_kl(*pair, **tensors, **options))
    assert torch.equal(policy(*pair, tokens, **tensors), fused_policy_reverse_kl(*pair, tokens, **tensors, **options))
    expected = fused_log_prob(student, weight, tokens, bias=bias, **tensors, **options)
    assert torch.equal(log_prob(student, weight, tokens, bias=bias, **tensors), expected)
    assert "temperature=1.3" in repr(kl) and not list(policy.parameters())


MODULES = [FusedReverseKL, FusedPolicyReverseKL, FusedLogProb]


@pytest.mark.parametrize("module", MODULES)
def test_a_misspelt_option_is_refused_with_the_nearest_one(module):
    with pytest.raises(TypeError, match=f"{module.__name__}: no option 'temprature'; did you mean 'temperature'") as e:
        module(temprature=2.0)
    assert "\n" not in str(e.value)
    with pytest.raises(
        TypeError, match="no option 'x'; expected one of .*backend,.* temperature, vocab_group, vocab_s"
    ):
        module(x=1)
    with pytest.raises(TypeError, match=f"{module.__name__}: mask is a tensor; give it at each call, not here"):
        module(mask=torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("module, name", [(FusedReverseKL, "tokens"), (FusedReverseKL, "student_bias"),
                                          (FusedPolicyReverseKL, "tokens"), (FusedLogProb, "bias")])  # fmt: skip
def test_a_tensor_is_refused_as_an_option(module, name):
    with pytest.raises(TypeError, match=f"{name} is a tensor"):
        module(**{name: torch.zeros(3)})


WRONG = [
    ("temperature", -1), ("softcap", 0), ("reduction", "avg"), ("skip_tolerance", "x"), ("skip_tolerance", 1.0),
    ("backend", "magic"), ("beta", 2), ("clip", 0), ("baseline", "v"),
]  # fmt: skip
ONLY = {"beta": FusedReverseKL, "clip": FusedReverseKL, "baseline": FusedPolicyReverseKL}  # the one that has it


@pytest.mark.parametrize("name, value", WRONG)
def test_a_wrong_value_is_refused_as_the_function_does(name, value):
    student, weight, teacher, _, _, tokens, _ = small_inputs()
    calls = [
        (FusedReverseKL, lambda **wrong: fused_reverse_kl(student, weight, teacher, **wrong)),
        (
            FusedPolicyReverseKL,
            lambda **wrong: fused_policy_reverse_kl(student, weight, teacher, None, tokens, **wrong),
        ),
        (FusedLogProb, lambda **wrong: fused_log_prob(student, weight, tokens, **wrong)),
    ]
    for module, call in calls:
        if module is not ONLY.get(name, module):
            continue
        with pytest.raises(ValueError, match=f"^{name}: ") as of_call:
            call(**{name: value})
        with pytest.raises(ValueError, match=f"^{name}: ") as of_module:
            module(**{name: value})
        assert str(of_call.value) == str(of_module.value)


def test_statistics_where_they_are_asked_for():
    student, weight, teacher, *_ = small_inputs()
    module = FusedReverseKL(return_stats=True)
    loss, stats = module(student, weight, teacher)
    assert "kl" in stats and loss.ndim == 0 and "return_stats=True" in repr(module)
