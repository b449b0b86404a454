"""Trees of segments against a row for every path, in float64; and what a shared prefix refuses or keeps."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from opsdl.prefix import Responses, Segment, prefill, response_hidden, tree, tree_hidden
from tests.support.models import SHAPE, VOCABULARY, make_group, make_model, relative, separate_rows

ROUNDING = 1e-6  # transformers' norms and rotary embedding are float32 inside


def make_tree(lengths, seed=0):
    """lengths: (own length, subtrees...) in nested tuples."""
    generator = torch.Generator().manual_seed(seed)

    def grow(own, *below):
        return Segment(torch.randint(VOCABULARY, (own,), generator=generator), [grow(*child) for child in below])

    return grow(*lengths)


def paths(node, before=()):
    """Every segment, depth first, with its ancestors."""
    here = (*before, node.tokens)
    yield here
    for child in node.children:
        yield from paths(child, here)


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


TREES = {
    "document, questions, responses": (9, (4, (3,), (1,), (5,)), (2, (2,), (6,)), (3,)),
    "one segment": (7,),
    "a chain": (1, (1, (1, (4,)))),
}


@pytest.mark.parametrize("alone", [1, 4, 256])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("lengths", TREES.values(), ids=TREES)
def test_a_tree_equals_a_row_for_every_path(lengths, kind, alone, monkeypatch):
    monkeypatch.setattr(tree, "ALONE", alone)  # which segments attend to themselves one by one
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


def test_layers_that_are_no_full_attention_are_refused():
    small = {**SHAPE, "max_position_embeddings": 64}
    gemma = Gemma2Config(**small, query_pre_attn_scalar=8, sliding_window=None, layer_types=["full_attention"] * 2)
    gated = Qwen3NextConfig(
        **SHAPE, layer_types=["full_attention", "linear_attention"], num_experts=0, mlp_only_layers=[0, 1],
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    for config, message in (
        (gemma, "layer 0 soft-caps its attention scores"),
        (gated, "layer 1 is linear_attention; only full attention"),
        (MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2), "layer 0 is linear_attention"),
        (Gemma3TextConfig(**SHAPE), "sliding window"),
        (MistralConfig(**SHAPE, sliding_window=4), "sliding window"),
        (LlamaConfig(**SHAPE, attention_dropout=0.1), "dropout"),
    ):
        model = AutoModelForCausalLM.from_config(config).train()
        with pytest.raises(ValueError, match=message):
            prefill(model, torch.arange(6))
        with pytest.raises(ValueError, match=message):
            response_hidden(model, torch.arange(6), Responses(torch.ones(1, 2).long(), torch.ones(1, 2).bool()))


@pytest.mark.parametrize("mode", ["offload", "autocast"])
def test_under_offload_and_autocast(mode):
    """As separate rows in the same mode; under autocast, no further from float64 than those."""
    from contextlib import nullcontext

    ids, responses = make_group([4, 2, 5])
    weight = torch.randn(3, 5, 32, dtype=torch.float64)
    dtype = torch.float64 if mode == "offload" else torch.float32
    cast = nullcontext if mode == "offload" else lambda: torch.autocast("cpu", torch.bfloat16)

    def gradients(run, model):
        model.zero_grad()
        with torch.autograd.graph.save_on_cpu() if mode == "offload" else nullcontext():
            with cast():
                hidden = run(model, ids, responses)
            (hidden.double() * weight.where(responses.mask[..., None], 0.0)).sum().backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    model = make_model(dtype=dtype)
    rows, packed = gradients(separate_rows, model), gradients(response_hidden, model)
    if mode == "offload":
        assert all(relative(packed[name], rows[name]) <= ROUNDING for name in rows)
        return
    cast = nullcontext
    truth = gradients(separate_rows, make_model(dtype=torch.float64))
    errors = [sum(float((x[name] - truth[name]).norm() ** 2) for name in truth) ** 0.5 for x in (packed, rows)]
    assert errors[0] <= 1.2 * errors[1]


def test_a_detached_prefix_keeps_nothing_of_itself():
    """What the graph holds grows with the prefix by its keys and values, which the cache holds anyway."""
    model = make_model()
    held = []
    for length in (8, 40):
        ids, responses = make_group([3, 3], prefix_length=length)
        cache = prefill(model, ids)
        storages = {x.untyped_storage().data_ptr() for pair in cache.layers.values() for x in pair}
        sizes = {}

        def pack(x, sizes=sizes, storages=storages):
            storage = x.untyped_storage()
            if storage.data_ptr() not in storages:
                sizes[storage.data_ptr()] = (x, storage.nbytes())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = response_hidden(model, ids, responses, prefix_gradient="detached", prefix=cache)
        held.append(sum(size for _, size in sizes.values()))
        hidden.sum().backward()
        assert all(x.grad is None for pair in cache.layers.values() for x in pair)
    assert held[0] == held[1] > 0


@pytest.mark.parametrize("alone", [4, 256])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_attention_of_a_tree_is_exact(dtype, bound, alone, monkeypatch):
    """Against dense masked attention in float64, every gradient; the same bits again."""
    monkeypatch.setattr(tree, "ALONE", alone)
    segments, spans = [], []
    tree._flatten(make_tree(TREES["document, questions, responses"]), 0, segments, spans, [])
    layout, length = tree.TreeLayout(spans, torch.device("cpu")), spans[-1][1]
    token = torch.arange(length)
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for start, end, last in spans:
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
        out = tree.TreeAttention.apply(*inputs, layout, 0.25)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(dtype))))
    for x, again, truth in zip(*results, (expected, *expected_gradients), strict=True):
        assert relative(x, truth) <= bound
        assert torch.equal(x, again)
