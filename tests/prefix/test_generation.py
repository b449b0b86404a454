"""Rollouts: token for token what the model says, and distributed as it says."""

import pytest
import torch

from opsdl.prefix import generate, prefill, response_hidden
from tests.support.models import VOCABULARY, make_group, make_model


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


def test_errors_name_the_argument():
    model = make_model()
    cache = prefill(model, make_group([1])[0])
    go = dict(max_new_tokens=2, eos_token_id=1)
    for arguments, changes, message in (
        (cache, dict(max_new_tokens=0), "max_new_tokens: 0"),
        (cache, dict(num_responses=0), "num_responses: 0"),
        (cache, dict(temperature=-1), "temperature: -1"),
        (cache, dict(top_p=0), "top_p: 0"),
        (cache, dict(eos_token_id=[]), "eos_token_id: empty"),
        ([], {}, "empty sequence"),
        (cache, dict(max_new_tokens=60), "60 response tokens exceed"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, arguments, **{**go, **changes})
