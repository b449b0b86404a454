"""The one object that a call is, on its way through the operators."""

import pytest
import torch

from opsdl.losses.call import FIELDS, Call, Wanted, schema
from opsdl.losses.values import Value
from tests.support.losses import small_inputs


def make_call(**changed):
    student, weight, teacher, teacher_weight, bias, tokens, mask = small_inputs()
    given = dict(
        hidden_NH=student, weight_VH=weight, bias_V=bias, teacher_hidden_NK=teacher, teacher_weight_VK=None,
        teacher_bias_V=None, tokens_N=tokens, scale_N=mask.double(), value=Value.KL, temperature=1.0, softcap=None,
        beta=1.0, clip=None, skip_tolerance=0.0, vocab_size=140, group="", backend="torch",
        wanted=Wanted(True, False, True),
    )  # fmt: skip
    return Call(**given | changed)


@pytest.mark.parametrize("value", Value)
def test_flat_and_back(value):
    call = make_call(value=value, clip=2.0)
    flat = call.flat()
    assert len(flat) == len(FIELDS) and type(flat[FIELDS.index("value")]) is str
    back = Call.unflat(flat)
    assert back.value is value and type(back.wanted) is Wanted
    assert all(getattr(back, name) is getattr(call, name) for name in FIELDS if name != "wanted")


def test_schema_follows_the_types_of_the_fields():
    arguments = dict(reversed(argument.split()) for argument in schema().split(", "))
    assert tuple(arguments) == FIELDS
    assert arguments["scale_N"] == "Tensor" and arguments["tokens_N"] == "Tensor?" and arguments["clip"] == "float?"
    assert arguments["value"] == "str" and arguments["wanted"] == "bool[]" and arguments["vocab_size"] == "int"


def test_the_differentiable_tensors_are_the_first_fields():
    call = make_call()
    assert all(x is getattr(call, name) for x, name in zip(call.differentiable, FIELDS, strict=False))


def test_padding_is_cut_from_every_head():
    call = make_call(teacher_weight_VK=torch.randn(145, 6))
    assert call.padding == 10 and call.shards.total == 140
    assert len(call.head.weight) == len(call.head.bias) == len(call.second.head.weight) == 140
