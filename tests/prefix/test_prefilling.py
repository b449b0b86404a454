"""Prefixes that run alone, and prefixes that continue one another."""

import pytest
import torch

from opsdl.models import checkpoint_activations
from opsdl.prefix import (
    FreedSequenceError,
    KeyValuePool,
    OutOfBlocksError,
    StalePrefixError,
    extend,
    generate,
    packed_hidden,
    prefill,
    response_hidden,
)
from tests.support.models import (
    CONFIGS,
    gradients,
    make_group,
    make_model,
    relative,
    rollout,
    same,
    separate_rows,
    token_bytes,
)

ROUNDING = 1e-6  # transformers' norms and rotary embedding are float32 inside


def questions(document_P, lengths=(2, 3, 7)):
    """Prompts that begin with the document and go on for so many tokens."""
    return [torch.cat([document_P, make_group([1], length, seed=length)[0]]) for length in lengths]


def family(model, gradient=False, pool=None):
    """(prompts, caches): a document, three questions about it, and a question of the last question; one alone."""
    document_P, _ = make_group([1])
    prompts = questions(document_P)
    deeper = torch.cat([prompts[2], make_group([1], 4, seed=9)[0]])
    other_P, _ = make_group([1], 8, seed=8)
    document = prefill(model, document_P, gradient=gradient, pool=pool)
    caches = extend(model, document, prompts, gradient=gradient)
    (below,) = extend(model, caches[2], [deeper], gradient=gradient)
    alone = prefill(model, other_P, gradient=gradient, pool=pool)
    order = [0, 4, 2, 3, 1]  # what shares a part is not side by side
    every = [(p, c) for p, c in zip([*prompts, deeper, other_P], [*caches, below, alone], strict=True)]
    prompts, caches = zip(*(every[i] for i in order), strict=True)
    return list(prompts), list(caches)


def storage_bytes(caches):
    """The bytes of all distinct storages of keys and values."""
    tensors = [x for cache in caches for part in cache.parts for pair in part.layers.values() for x in pair]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_prefixes_share_has_the_gradients_of_separate_rows(kind):
    """Chains of one to three parts, two responses of each: rollout, hidden states, one backward through everything."""
    model = make_model(kind)
    prompts, caches = family(model, gradient=True)
    assert [len(cache.parts) for cache in caches] == [2, 1, 2, 3, 2] and all(cache.has_gradient for cache in caches)
    options = dict(num_responses=2, max_new_tokens=6, temperature=0, eos_token_id=0)
    alone = [prefill(model, prompt) for prompt in prompts]
    for a, b in zip(generate(model, caches, **options), generate(model, alone, **options), strict=True):
        assert torch.equal(a.tokens, b.tokens)
    groups = generate(model, caches, num_responses=2, max_new_tokens=6, eos_token_id=range(30))
    expected = torch.cat([separate_rows(model, p, g)[g.mask] for p, g in zip(prompts, groups, strict=True)])
    weight = torch.randn(expected.shape, dtype=torch.float64)
    truth = gradients(model, expected, weight)
    for over in (caches, None):
        hidden_NH = packed_hidden(model, prompts, groups, prefix=over)
        assert relative(hidden_NH, expected) < ROUNDING
        got = gradients(model, hidden_NH, weight)
        for name, gradient in truth.items():
            assert relative(got[name], gradient) < ROUNDING, name
    with torch.no_grad():
        detached = packed_hidden(model, prompts, groups, prefix=caches, prefix_gradient="detached")
        assert relative(detached, expected) < ROUNDING


def test_questions_add_their_own_tokens_and_nothing_else():
    """The keys and values of k questions on one document are one document and k questions."""
    model = make_model()
    document_P, _ = make_group([1], 40)
    document = prefill(model, document_P)
    caches = extend(model, document, questions(document_P))
    token = token_bytes(document)
    assert storage_bytes([document]) == document.nbytes == 39 * token
    assert storage_bytes([document, *caches]) == (39 + 2 + 3 + 7) * token
    assert [cache.nbytes for cache in caches] == [(39 + n) * token for n in (2, 3, 7)]
    for cache, ids in zip(caches, questions(document_P), strict=True):
        for pair, expected in zip(cache.layers.values(), prefill(model, ids).layers.values(), strict=True):
            assert all(relative(x, y) < ROUNDING for x, y in zip(pair, expected, strict=True))


def test_questions_in_a_pool():
    model = make_model()
    ids, _ = make_group([1], 20)
    pool = KeyValuePool(1 << 20)
    document = prefill(model, ids, pool=pool)
    block = 16 * token_bytes(document)
    caches = extend(model, document, questions(ids))
    assert pool.held_bytes == (2 + 3) * block  # 19 tokens; 2, 3 and 7
    plain = extend(model, prefill(model, ids), questions(ids))
    for a, b in zip(rollout(model, caches), rollout(model, plain), strict=True):
        assert same(a, b)
    _, group = make_group([3, 1])
    hidden = [
        response_hidden(model, questions(ids)[1], group, prefix_gradient="detached", prefix=x[1])
        for x in (caches, plain)
    ]
    assert torch.equal(*hidden)
    document.free()
    caches[0].free()
    assert pool.held_bytes == (2 + 2) * block  # the document is held on
    assert same(rollout(model, caches[1]), rollout(model, plain[1]))
    with pytest.raises(FreedSequenceError):
        caches[0].free()
    with pytest.raises(FreedSequenceError):
        extend(model, document, questions(ids))
    for cache in caches[1:]:
        cache.free()
    assert pool.held_bytes == 0


def test_questions_that_do_not_fit_leave_nothing_behind():
    model = make_model()
    ids, _ = make_group([1], 17)
    token = token_bytes(prefill(model, ids))
    pool = KeyValuePool(16 * token * 3)  # one block for the document, two for three questions
    document = prefill(model, ids, pool=pool)
    with pytest.raises(OutOfBlocksError):
        extend(model, document, questions(ids))
    assert pool.held_bytes == 16 * token
    document.free()
    assert pool.held_bytes == 0


def test_errors_name_the_argument():
    model = make_model()
    ids, _ = make_group([1])
    document, pool = prefill(model, ids), KeyValuePool(1 << 20)
    cases = [
        (lambda: prefill(model, ids[None]), r"prefix_ids: expected int64 \[P\]"),
        (lambda: prefill(model, ids[:1]), "P >= 2"),
        (lambda: prefill(model, ids.repeat(7)), "exceed the model's context of 64"),
        (lambda: prefill(model, ids, gradient=True, pool=pool), "pool: given with gradient=True"),
        (lambda: extend(model, document, [ids]), "prefixes: 11 tokens; expected the parent's 11 and more"),
        (lambda: extend(model, document, [questions(ids)[0] + 1]), "expected the parent's 11"),
        (lambda: extend(model, document, questions(ids), gradient=True), "parent: made without gradient"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    model.train()
    checkpoint_activations(model)
    with pytest.raises(ValueError, match="activation checkpointing"):
        prefill(model, ids, gradient=True)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(StalePrefixError):
        extend(model, document, questions(ids))
