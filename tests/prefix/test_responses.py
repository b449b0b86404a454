"""Shared prefix against separate rows: the packed stream, the cache, the rollouts, in float64 and bf16."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from opsdl.losses import fused_reverse_kl
from opsdl.prefix import (
    PrefixCache,
    Responses,
    StalePrefixError,
    attach,
    detach,
    extend,
    generate,
    prefill,
    response_hidden,
)
from opsdl.prefix.attention import partial
from tests.support.models import CONFIGS, SHAPE, VOCABULARY, make_group, make_model, relative, separate_rows


def gradients(model, hidden, weight):
    model.zero_grad()
    (hidden * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
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


@pytest.mark.parametrize("kind", CONFIGS)
def test_questions_share_their_document(kind):
    """Two levels: one document, three questions of different length, two responses each, one backward."""
    model = make_model(kind)
    document_P, _ = make_group([1])
    prompts = [torch.cat([document_P, make_group([1], length, seed=length)[0]]) for length in (2, 3, 7)]
    document = prefill(model, document_P, gradient=True)
    caches = extend(model, document, prompts, gradient=True)
    alone = [prefill(model, prompt) for prompt in prompts]
    options = dict(num_responses=2, max_new_tokens=6, temperature=0, eos_token_id=0)
    for a, b in zip(generate(model, caches, **options), generate(model, alone, **options), strict=True):
        assert torch.equal(a.tokens, b.tokens)
    groups = generate(model, caches, num_responses=2, max_new_tokens=6, eos_token_id=range(30))
    weight = torch.randn(6, 32, dtype=torch.float64)

    weights = torch.cat([weight[: g.tokens.shape[1]].expand(2, -1, 32)[g.mask] for g in groups])

    def packed(hiddens):
        return torch.cat([hidden[group.mask] for hidden, group in zip(hiddens, groups, strict=True)])

    expected_hidden = packed([separate_rows(model, p, g) for p, g in zip(prompts, groups, strict=True)])
    expected = gradients(model, expected_hidden, weights)
    for hiddens in (
        response_hidden(model, prompts, groups, prefix=caches),
        response_hidden(model, prompts, groups),
    ):
        assert relative(packed(hiddens), expected_hidden) < 1e-6
        got = gradients(model, packed(hiddens), weights)
        for name, gradient in expected.items():
            assert relative(got[name], gradient) < 1e-6, name
    with torch.no_grad():
        assert relative(packed(response_hidden(model, prompts, groups)), expected_hidden) < 1e-6
    with pytest.raises(ValueError, match="prefixes: 11 tokens; expected the parent's 11 and more"):
        extend(model, document, [document_P])
    with pytest.raises(ValueError, match="expected the parent's 11"):
        extend(model, document, [prompts[0] + 1])
    with pytest.raises(ValueError, match="3 prefixes for 2 groups"):
        response_hidden(model, prompts, groups[:2])


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rows_attention_is_exact(dtype, bound):
    """The attention alone, against dense masked attention in float64, every gradient."""
    from opsdl.prefix.layouts.cached import RowsAttention
    from opsdl.prefix.responses import Ragged

    prefix_length, lengths = 37, [9, 1, 5]
    mask_GT = torch.arange(9) < torch.tensor(lengths)[:, None]
    count = sum(lengths)
    generator = torch.Generator().manual_seed(3)
    inputs64 = [
        torch.randn(1, heads, length, 16, dtype=torch.float64, generator=generator).requires_grad_()
        for heads, length in [(6, count), (2, prefix_length), (2, prefix_length), (2, count), (2, count)]
    ]
    query, prefix_key, prefix_value, key, value = inputs64

    def rows_attention(query, prefix_key, prefix_value, key, value):
        return RowsAttention.apply(query, key, value, Ragged(mask_GT), [count], 0.25, prefix_key, prefix_value)

    row_of = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    index = torch.arange(count)
    own = (row_of[:, None] == row_of) & (index[:, None] >= index)
    allowed = torch.cat([torch.ones(count, prefix_length, dtype=torch.bool), own], 1)
    keys, values = (torch.cat(pair, 2).repeat_interleave(3, 1) for pair in ((prefix_key, key), (prefix_value, value)))
    scores = (query @ keys.mT / 4).masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(-1) @ values
    grad_out = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    expected_gradients = torch.autograd.grad(expected, inputs64, grad_out)

    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs64]
    out = rows_attention(*inputs)
    assert relative(out, expected) < bound
    got = torch.autograd.grad(out, inputs, grad_out.to(dtype))
    for x, y in zip(got, expected_gradients, strict=True):
        assert relative(x, y) < bound
    again = torch.autograd.grad(rows_attention(*inputs), inputs, grad_out.to(dtype))
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


def test_written_out_partials_agree_with_the_operator(monkeypatch):
    """The path of other devices, run on this one."""
    generator = torch.Generator().manual_seed(4)
    query, key, value, grad_out = (
        torch.randn(2, heads, 13, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2, 4)
    )
    for causal in (False, True):
        out, lse = partial.attend(query, key, value, 0.3, causal)
        backward = partial.attend_backward(grad_out, query, key, value, out, lse, 0.3, causal)

        class Elsewhere(torch.Tensor):
            device = torch.device("meta")

        moved = query.as_subclass(Elsewhere)
        monkeypatch.setattr(partial, "_scores", lambda q, *a, f=partial._scores: f(q.as_subclass(torch.Tensor), *a))
        out_2, lse_2 = partial.attend(moved, key, value, 0.3, causal)
        backward_2 = partial.attend_backward(grad_out, moved, key, value, out, lse, 0.3, causal)
        monkeypatch.undo()
        for x, y in zip((out, lse, *backward), (out_2, lse_2, *backward_2), strict=True):
            assert relative(y.as_subclass(torch.Tensor), x) < 1e-14


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


def test_one_prefill_equals_separate_prefills_token_for_token():
    model = make_model()
    prefixes = [make_group([1], prefix_length=n, seed=n)[0] for n in (9, 17, 5)]
    expected = []
    for prefix_P in prefixes:
        row = prefix_P.clone()
        for _ in range(12):
            row = torch.cat([row, model(row[None], use_cache=False).logits[0, -1].argmax(keepdim=True)])
        expected.append(row[len(prefix_P) :])
    end = expected[0][6]  # a token that ends at least the first row early
    groups = generate(
        model, [prefill(model, p) for p in prefixes], num_responses=3, max_new_tokens=12, temperature=0.0,
        eos_token_id=int(end),
    )  # fmt: skip
    for tokens_T, group in zip(expected, groups, strict=True):
        stops = (tokens_T == end).nonzero()
        length = int(stops[0]) + 1 if len(stops) else 12
        assert group.lengths == [length] * 3
        for row in group.tokens:
            assert row[:length].tolist() == tokens_T[:length].tolist()
    assert groups[0].lengths[0] <= 7


def test_generate_matches_transformers_and_reports_log_probs(smollm2, tokenizer):
    text = "Name the three primary colours, then the capital of France."
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    end = tokenizer.eos_token_id
    with torch.no_grad():
        expected = smollm2.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=end)[0, ids.shape[1] :]
    ours = generate(
        smollm2, prefill(smollm2, ids[0]), num_responses=2, max_new_tokens=12, temperature=0, eos_token_id=end
    )
    assert ours.tokens[0].tolist() == ours.tokens[1].tolist() == expected.tolist()
    hidden_GTH = response_hidden(smollm2, ids[0], ours)
    log_probs = smollm2.lm_head(hidden_GTH).log_softmax(-1).gather(2, ours.tokens[..., None])[..., 0]
    assert torch.allclose(log_probs[ours.mask], ours.log_probs[ours.mask], atol=1e-4)


def test_sampling_follows_the_distribution():
    model = make_model()
    prefix_P, _ = make_group([1])
    with torch.no_grad():
        probabilities = (model(prefix_P[None]).logits[0, -1] / 3.0).softmax(-1)
    cache, count = prefill(model, prefix_P), 4000
    draw = dict(num_responses=count, max_new_tokens=1, temperature=3.0, eos_token_id=VOCABULARY - 1)
    first = generate(model, cache, **draw, generator=torch.Generator().manual_seed(0)).tokens[:, 0]
    frequency = torch.bincount(first, minlength=VOCABULARY) / count
    error = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((frequency - probabilities).abs() < 5 * error + 1e-3).all()
    again = generate(model, cache, **draw, generator=torch.Generator().manual_seed(0)).tokens[:, 0]
    assert torch.equal(first, again)
    nucleus = generate(model, cache, **draw, top_p=0.5, generator=torch.Generator().manual_seed(0)).tokens[:, 0]
    ordered, order = probabilities.sort(descending=True)
    kept = order[: int((ordered.cumsum(0) < 0.5).sum()) + 1]
    assert set(nucleus.tolist()) == set(kept.tolist())


def test_the_cache_refuses_other_weights():
    model = make_model()
    prefix_P, responses = make_group([2, 3])
    cache = prefill(model, prefix_P)
    generate(model, cache, max_new_tokens=1, eos_token_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    response_hidden(model, prefix_P, responses).sum().backward()
    optimizer.step()
    with pytest.raises(StalePrefixError, match="call prefill again"):
        generate(model, cache, max_new_tokens=1, eos_token_id=0)
    with pytest.raises(StalePrefixError):
        response_hidden(model, prefix_P, responses, prefix_gradient="detached", prefix=cache)
    with pytest.raises(StalePrefixError):
        generate(make_model(), cache, max_new_tokens=1, eos_token_id=0)


def test_attach_keeps_ordinary_calls_and_can_be_undone():
    model = make_model()
    ids = torch.randint(VOCABULARY, (2, 10))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding must reach the attention
    before, implementation = model(ids, attention_mask=mask).logits, model.config._attn_implementation
    attach(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    detach(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_errors_name_the_argument():
    model = make_model()
    prefix_P, responses = make_group([2, 3])
    tokens_GT = responses.tokens
    cache = prefill(model, prefix_P)
    go = dict(max_new_tokens=2, eos_token_id=1)
    cases = [
        (lambda: prefill(model, prefix_P[None]), r"prefix_ids: expected int64 \[P\]"),
        (lambda: prefill(model, prefix_P[:1]), "P >= 2"),
        (lambda: prefill(model, prefix_P.repeat(7)), "exceed the model's context of 64"),
        (lambda: response_hidden(model, prefix_P.repeat(6)[:62], responses), "62 tokens and 3 response tokens"),
        (lambda: Responses(tokens_GT, torch.zeros_like(tokens_GT, dtype=torch.bool)), "response 0 is empty"),
        (lambda: Responses(tokens_GT, torch.tensor([[True, False, True]] * 2)), "True up to the end"),
        (lambda: Responses(tokens_GT, torch.ones(2, 2, dtype=torch.bool)), r"expected bool \(2, 3\)"),
        (lambda: Responses(tokens_GT.float(), tokens_GT > 0), "expected int64"),
        (lambda: response_hidden(model, prefix_P, responses, prefix_gradient="half"), "'exact' or 'detached'"),
        (lambda: response_hidden(model, prefix_P, responses, prefix=cache), "made without gradient"),
        (
            lambda: response_hidden(model, prefix_P + 1, responses, prefix_gradient="detached", prefix=cache),
            "other tok",
        ),
        (lambda: generate(model, cache, max_new_tokens=0, eos_token_id=1), "max_new_tokens: 0"),
        (lambda: generate(model, cache, **go, num_responses=0), "num_responses: 0"),
        (lambda: generate(model, cache, **go, temperature=-1), "temperature: -1"),
        (lambda: generate(model, cache, **go, top_p=0), "top_p: 0"),
        (lambda: generate(model, cache, max_new_tokens=1, eos_token_id=[]), "eos_token_id: empty"),
        (lambda: generate(model, [], **go), "empty sequence"),
        (lambda: generate(model, cache, max_new_tokens=60, eos_token_id=1), "60 response tokens exceed"),
        (
            lambda: partial.attend(*(torch.zeros(1, h, n, 8) for h, n in ((5, 3), (2, 3), (2, 3))), 1.0, False),
            "multiple",
        ),
        (lambda: partial.attend(*(torch.zeros(1, 2, n, 8) for n in (3, 0, 0)), 1.0, False), "non-empty"),
        (lambda: partial.attend(*(torch.zeros(1, 2, n, 8) for n in (3, 4, 4)), 1.0, True), "Lq == Lk"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_unsupported_layers_are_refused():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=4))
    with pytest.raises(ValueError, match="layer 0 has a sliding window"):
        prefill(model, torch.arange(6))
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match="attention dropout is 0.1"):
        prefill(model, torch.arange(6))


def test_the_cache_holds_one_copy_of_the_prefix():
    model = make_model()
    prefix_P, _ = make_group([1], prefix_length=20)
    cache = prefill(model, prefix_P)
    assert isinstance(cache, PrefixCache)
    assert cache.nbytes == 2 * 2 * 19 * 2 * 8 * 8  # K and V, 2 layers, 19 tokens, 2 heads, 8 dims, 8 bytes
