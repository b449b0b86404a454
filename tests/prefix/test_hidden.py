"""Hidden states of responses against a forward of its own for each, in float64 and bf16."""

from contextlib import nullcontext

import pytest
import torch

from opsdl.losses import fused_reverse_kl
from opsdl.models import checkpoint_activations
from opsdl.prefix import Responses, generate, packed_hidden, prefill, response_hidden
from tests.support.models import CONFIGS, gradients, make_group, make_model, relative, separate_rows

ROUNDING = 1e-6  # transformers' norms and rotary embedding are float32 inside


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 7, 4, 2], [6]], ids=["even", "ragged", "single"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_stream_equals_separate_rows(kind, lengths, checkpointing):
    model = make_model(kind)
    prefix_P, responses = make_group(lengths)
    weight = torch.randn(len(lengths), max(lengths), 32, dtype=torch.float64) * responses.mask[..., None]
    expected = separate_rows(model, prefix_P, responses)
    expected_gradients = gradients(model, expected, weight)
    if checkpointing:
        model.train()
        checkpoint_activations(model)
    hidden = response_hidden(model, prefix_P, responses)
    assert relative(hidden, expected) < 1e-6  # transformers' norms and rotary embedding are float32 inside
    assert hidden[~responses.mask].abs().sum() == 0
    packed_gradients = gradients(model, hidden, weight)
    assert packed_gradients.keys() == expected_gradients.keys()
    for name, gradient in packed_gradients.items():
        assert relative(gradient, expected_gradients[name]) < 1e-6, name


def test_the_first_response_token_is_supervised():
    """Responses of one token: all there is to learn from is the output of the last prefix token."""
    model = make_model()
    prefix_P, responses = make_group([1, 1])
    hidden = response_hidden(model, prefix_P, responses)
    expected = model.base_model(prefix_P[None], use_cache=False).last_hidden_state[0, -1]
    assert relative(hidden[0, 0], expected) < 1e-6 and relative(hidden[1, 0], expected) < 1e-6
    teacher = hidden.detach() + 0.1 * torch.randn(hidden.shape, dtype=torch.float64)
    fused_reverse_kl(hidden, model.lm_head.weight, teacher, mask=responses.mask).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.model.layers.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_prefill_serves_rollout_and_backward(kind):
    model = make_model(kind)
    prefix_P, _ = make_group([1])
    cache = prefill(model, prefix_P, gradient=True)
    responses = generate(model, cache, num_responses=3, max_new_tokens=6, eos_token_id=range(40))
    responses = Responses(responses.tokens, responses.mask)
    weight = torch.randn(*responses.tokens.shape, 32, dtype=torch.float64) * responses.mask[..., None]
    got = gradients(model, response_hidden(model, prefix_P, responses, prefix=cache), weight)
    expected = gradients(model, separate_rows(model, prefix_P, responses), weight)
    for name, gradient in expected.items():
        assert relative(got[name], gradient) < 1e-6, name


def test_bf16_is_no_worse_than_separate_rows():
    model = make_model(dtype=torch.float32)
    prefix_P, responses = make_group([6, 3, 8], prefix_length=40)
    expected = separate_rows(model.double(), prefix_P, responses)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        packed = response_hidden(model, prefix_P, responses)
        rows = separate_rows(model, prefix_P, responses)
    assert relative(packed.double(), expected) <= 1.1 * relative(rows.double(), expected)


def test_detached_prefix_gets_no_gradient():
    model = make_model()
    prefix_P, responses = make_group([4, 6, 1])
    cache = prefill(model, prefix_P)
    detached = response_hidden(model, prefix_P, responses, prefix_gradient="detached", prefix=cache)
    assert torch.equal(detached, response_hidden(model, prefix_P, responses, prefix_gradient="detached"))
    assert relative(detached, response_hidden(model, prefix_P, responses)) < 1e-6
    weight = torch.randn(detached.shape, dtype=torch.float64) * responses.mask[..., None]
    cache = prefill(model, prefix_P, gradient=True)
    again = response_hidden(model, prefix_P, responses, prefix_gradient="detached", prefix=cache)
    # Only the tokens of the rows feed the embedding: what the prefix alone holds gets none.
    embedding = gradients(model, detached, weight)["model.embed_tokens.weight"]
    assert torch.equal(embedding, gradients(model, again, weight)["model.embed_tokens.weight"])
    only_prefix = set(prefix_P[:-1].tolist()) - set(responses.tokens.flatten().tolist()) - {int(prefix_P[-1])}
    assert only_prefix and embedding[list(only_prefix)].abs().sum() == 0
    exact = gradients(model, response_hidden(model, prefix_P, responses), weight)["model.embed_tokens.weight"]
    assert exact[list(only_prefix)].abs().sum() > 0


def test_errors_name_the_argument():
    model = make_model()
    prefix_P, responses = make_group([2, 3])
    cache = prefill(model, prefix_P)
    cases = [
        (lambda: response_hidden(model, prefix_P.repeat(6)[:62], responses), "62 tokens and 3 response tokens"),
        (lambda: response_hidden(model, prefix_P, responses, prefix_gradient="half"), "'exact' or 'detached'"),
        (lambda: response_hidden(model, prefix_P, responses, prefix=cache), "made without gradient"),
        (
            lambda: response_hidden(model, prefix_P + 1, responses, prefix_gradient="detached", prefix=cache),
            "other tok",
        ),
        (lambda: packed_hidden(model, [prefix_P], [responses] * 2), "1 prefixes for 2 groups"),
        (lambda: packed_hidden(model, [], []), "0 prefixes for 0 groups"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("way", ["one stream", "over caches", "detached"])
def test_packed_hidden_states_are_the_padded_ones(way):
    """In the order of groups, responses and tokens, as `packed_tokens`; T differs between the groups."""
    model = make_model()
    prompts, groups = zip(*(make_group(n, prefix_length=p, seed=p) for p, n in ((9, [2, 5]), (4, [3]), (7, [1, 1]))),
                          strict=True)  # fmt: skip
    options = {}
    if way != "one stream":
        options = {"prefix": [prefill(model, ids, gradient=way == "over caches") for ids in prompts]}
    if way == "detached":
        options["prefix_gradient"] = "detached"
    packed_NH = packed_hidden(model, prompts, groups, **options)
    padded = response_hidden(model, prompts, groups, **options)
    assert torch.equal(packed_NH, torch.cat([x[group.mask] for x, group in zip(padded, groups, strict=True)]))
    rows = [separate_rows(model, ids, group)[group.mask] for ids, group in zip(prompts, groups, strict=True)]
    assert packed_NH.shape == (12, 32) and relative(packed_NH, torch.cat(rows)) < ROUNDING
    tokens = torch.cat([group.packed_tokens for group in groups])
    assert tokens.tolist() == torch.cat([group.tokens[group.mask] for group in groups]).tolist()


@pytest.mark.parametrize("mode", ["offload", "autocast"])
def test_under_offload_and_autocast(mode):
    """As separate rows in the same mode; under autocast, no further from float64 than those."""
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
