"""Trees of segments against a forward of its own for every path, in float64."""

import pytest
import torch

from opsdl.prefix import Segment, tree_hidden
from opsdl.prefix.layouts import stream
from tests.support.models import make_model, relative
from tests.support.trees import TREES, make_tree, paths

ROUNDING = 1e-6  # transformers' norms and rotary embedding are float32 inside


def by_rows(model, root, weights):
    """Hidden states of each segment from an ordinary row, and the gradients of a loss over all of them."""
    hidden, total = [], 0
    for path, weight in zip(paths(root), weights, strict=True):
        row = model.base_model(torch.cat(path)[None], use_cache=False).last_hidden_state[0, -len(path[-1]) :]
        hidden.append(row.detach())
        total = total + (row * weight).sum()
    model.zero_grad()
    total.backward()
    return hidden, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("alone", [1, 4, 256])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("lengths", TREES.values(), ids=TREES)
def test_a_tree_equals_a_row_for_every_path(lengths, kind, alone, monkeypatch):
    monkeypatch.setattr(stream, "ALONE", alone)  # which segments attend to themselves one by one
    model, root = make_model(kind), make_tree(lengths)
    weights = [torch.randn(len(path[-1]), 32, dtype=torch.float64) for path in paths(root)]
    expected, gradients = by_rows(model, root, weights)
    hidden = tree_hidden(model, root)
    assert all(torch.equal(x, y) for x, y in zip(hidden, tree_hidden(model, root), strict=True))
    assert all(relative(x, y) <= ROUNDING for x, y in zip(hidden, expected, strict=True))
    model.zero_grad()
    sum((x * weight).sum() for x, weight in zip(hidden, weights, strict=True)).backward()
    for name, expected in gradients.items():
        assert relative(dict(model.named_parameters())[name].grad, expected) <= ROUNDING, name


def test_several_trees_in_one_stream():
    model = make_model()
    roots = [make_tree((5, (2,), (3,)), seed=1), make_tree((2, (6, (1,))), seed=2)]
    together = tree_hidden(model, roots)
    alone = [x for root in roots for x in tree_hidden(model, root)]
    assert all(relative(x, y) <= ROUNDING for x, y in zip(together, alone, strict=True))


def test_errors():
    model = make_model()
    for root, message in (
        (Segment(torch.arange(0)), "L >= 1"),
        (Segment(torch.arange(3.0)), "expected int64"),
        (Segment(torch.arange(40), [Segment(torch.arange(25))]), "a path of 65 tokens; .* context of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            tree_hidden(model, root)
