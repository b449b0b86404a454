"""Responses, padded and packed."""

import pytest
import torch

from opsdl.prefix import Responses
from tests.support.models import make_group


def test_packed_forms_follow_the_mask():
    _, responses = make_group([2, 1, 4])
    tokens = responses.tokens
    assert responses.lengths == [2, 1, 4]
    assert responses.packed_tokens.tolist() == [*tokens[0, :2], tokens[1, 0], *tokens[2]]
    last = torch.tensor(88)
    assert responses.inputs(last).tolist() == [88, tokens[0, 0], 88, 88, *tokens[2, :3]]
    assert responses.positions(10).tolist() == [10, 11, 10, 10, 11, 12, 13]
    packed_NH = torch.randn(7, 3, requires_grad=True)
    padded_GTH = responses.pad(packed_NH)
    assert torch.equal(padded_GTH[responses.mask], packed_NH) and (padded_GTH[~responses.mask] == 0).all()
    (grad,) = torch.autograd.grad((padded_GTH * 2).sum(), packed_NH)
    assert (grad == 2).all()


def test_errors_name_the_argument():
    tokens_GT = torch.arange(6).view(2, 3)
    for arguments, message in (
        ((tokens_GT, torch.zeros_like(tokens_GT, dtype=torch.bool)), "response 0 is empty"),
        ((tokens_GT, torch.tensor([[True, False, True]] * 2)), "True up to the end"),
        ((tokens_GT, torch.ones(2, 2, dtype=torch.bool)), r"expected bool \(2, 3\)"),
        ((tokens_GT.float(), tokens_GT > 0), "expected int64"),
    ):
        with pytest.raises(ValueError, match=message):
            Responses(*arguments)
