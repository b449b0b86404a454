"""The attention of a stream, against dense masked attention in float64: every gradient, and the same bits again."""

import pytest
import torch

from opsdl.prefix.attention import partial
from opsdl.prefix.layouts import stream
from opsdl.prefix.layouts.tree import TreeLayout
from opsdl.prefix.tree import flatten
from tests.support.models import relative
from tests.support.trees import TREES, make_tree


@pytest.mark.parametrize("alone", [4, 256])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_attention_of_a_tree_is_exact(dtype, bound, alone, monkeypatch):
    """Against dense masked attention in float64, every gradient; the same bits again."""
    monkeypatch.setattr(stream, "ALONE", alone)
    spans = flatten([make_tree(TREES["document, questions, responses"])]).spans
    layout, length = TreeLayout(spans, torch.device("cpu")), spans[-1].end
    token = torch.arange(length)
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for start, end, last in ((span.start, span.end, span.last) for span in spans):
        allowed[start:end, start:end] = token[start:end, None] >= token[start:end]
        allowed[end:last, start:end] = True
    inputs64 = [torch.randn(1, heads, length, 16, dtype=torch.float64).requires_grad_() for heads in (6, 2, 2)]
    query, key, value = inputs64
    scores = query @ key.repeat_interleave(3, 1).mT / 4
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value.repeat_interleave(3, 1)
    grad_out = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, inputs64, grad_out)

    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs64]
    results = []
    for _ in range(2):
        out = layout.attend(0, *inputs, 0.25)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(dtype))))
    for x, again, truth in zip(*results, (expected, *expected_gradients), strict=True):
        assert relative(x, truth) <= bound
        assert torch.equal(x, again)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("readers", [
    [[(0, 15)]],  # one prefix of three responses
    [[(0, 15)], [(0, 9)], [(9, 15)]],  # a document, and two questions
    [[(0, 9), (10, 15)], [(9, 10)]],  # two documents in turn
    [],
], ids=["prefix", "document and questions", "documents in turn", "alone"])  # fmt: skip
def test_parts_outside_the_stream_are_exact(readers, dtype, bound):
    """Three sequences, of which some see parts of keys made before; a part is read once for all that see it."""
    ends, lengths = [9, 10, 15], [37, 5, 21]
    generator = torch.Generator().manual_seed(3)
    shapes = [(6, 15), (2, 15), (2, 15), *((2, lengths[i]) for i in range(len(readers)) for _ in range(2))]
    inputs64 = [
        torch.randn(1, heads, length, 16, dtype=torch.float64, generator=generator).requires_grad_()
        for heads, length in shapes
    ]
    query, key, value, *outside = inputs64
    token = torch.arange(15)
    sequence = torch.bucketize(token, torch.tensor(ends), right=True)
    allowed = [(sequence[:, None] == sequence) & (token[:, None] >= token)]
    for runs, part_key in zip(readers, outside[::2], strict=True):
        sees = sum((token >= start) & (token < end) for start, end in runs).bool()
        allowed.append(sees[:, None].expand(-1, part_key.shape[2]))
    keys, values = (torch.cat([x, *parts], 2).repeat_interleave(3, 1) for x, parts in (
        (key, outside[::2]), (value, outside[1::2])))  # fmt: skip
    scores = (query @ keys.mT / 4).masked_fill(~torch.cat(allowed, 1), -torch.inf)
    expected = scores.softmax(-1) @ values
    grad_out = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    truth = torch.autograd.grad(expected, inputs64, grad_out)

    sequences = list(zip([0, *ends[:-1]], ends, strict=True))
    layout = stream.Stream(sequences, torch.device("cpu"), readers=readers)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs64]

    def attend(query, key, value, *outside):
        return stream.StreamAttention.apply(query, key, value, layout, 0.25, *outside)

    out = attend(*inputs)
    assert relative(out, expected) < bound
    got = torch.autograd.grad(out, inputs, grad_out.to(dtype))
    for x, y in zip(got, truth, strict=True):
        assert relative(x, y) < bound
    again = torch.autograd.grad(attend(*inputs), inputs, grad_out.to(dtype))
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


def test_a_shared_part_is_read_once_each_way(monkeypatch):
    """Three readers of one document are one call of its keys, forward and backward; dK and dV come in one piece."""
    calls = []
    for name in ("attend", "attend_backward"):
        real = getattr(partial, name)
        monkeypatch.setattr(partial, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    layout = stream.Stream([(0, 2), (2, 4), (4, 6)], torch.device("cpu"), readers=[[(0, 2), (4, 6)]])
    query, key, value, *part = (torch.randn(1, 2, n, 8).requires_grad_() for n in (6, 6, 6, 5, 5))
    stream.StreamAttention.apply(query, key, value, layout, 1.0, *part).sum().backward()
    assert calls == ["attend"] * 2 + ["attend_backward"] * 2  # the sequences themselves, and the part
    assert all(x.grad.abs().sum() > 0 for x in part)
