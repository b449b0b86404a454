"""Prefix caches in tensors of their own and in the blocks of a pool: contents, bytes, faults."""

import pytest
import torch

from opsdl.prefix import (
    FreedSequenceError,
    KeyValuePool,
    PrefixCache,
    StalePrefixError,
    as_transformers,
    generate,
    prefill,
    response_hidden,
)
from tests.support.models import make_group, make_model, rollout, same


@pytest.mark.parametrize("length", [2, 17, 33, 40])
def test_a_pool_changes_nothing_but_where_things_lie(length):
    model = make_model()
    ids, responses = make_group([4, 1, 3], prefix_length=length)
    pool = KeyValuePool(1 << 20)
    other = prefill(model, make_group([1], prefix_length=20, seed=5)[0], pool=pool)
    plain, pooled = prefill(model, ids), prefill(model, ids, pool=pool)
    other.free()
    again = prefill(model, ids, pool=pool)  # in blocks that are not consecutive where they do not fit the gap
    for layer in plain.layers:
        for x, *others in zip(plain.layers[layer], pooled.layers[layer], again.layers[layer], strict=True):
            assert all(torch.equal(x, y) for y in others)
    assert same(rollout(model, plain), rollout(model, pooled)) and same(rollout(model, plain), rollout(model, again))
    for prefix in (pooled, again):
        hidden = [response_hidden(model, ids, responses, prefix_gradient="detached", prefix=x) for x in (plain, prefix)]
        assert torch.equal(*hidden)


def test_faults():
    model = make_model()
    ids, responses = make_group([3, 2])
    pool = KeyValuePool(1 << 20)
    prefix = prefill(model, ids, pool=pool)
    with pytest.raises(ValueError, match="layer 0 holds .*float64.*found .*float32"):
        prefill(make_model(dtype=torch.float32), ids, pool=pool)
    with pytest.raises(ValueError, match="the sequence is empty"):
        pool.layers(pool.create())
    with pytest.raises(ValueError, match="gradient=True"):
        prefill(model, ids, gradient=True, pool=pool)
    with pytest.raises(ValueError, match="rows: 0"):
        as_transformers(model, prefix, rows=0)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    for use in (
        lambda: as_transformers(model, prefix, rows=2),
        lambda: rollout(model, prefix),
        lambda: response_hidden(model, ids, responses, prefix_gradient="detached", prefix=prefix),
    ):
        with pytest.raises(StalePrefixError):
            use()
    model = make_model()
    prefix = prefill(model, ids, pool=pool)
    held = pool.held_bytes
    prefix.free()
    assert pool.held_bytes < held
    for use in (
        prefix.free,
        lambda: prefix.layers,
        lambda: as_transformers(model, prefix, rows=2),
        lambda: rollout(model, prefix),
        lambda: response_hidden(model, ids, responses, prefix_gradient="detached", prefix=prefix),
    ):
        with pytest.raises(FreedSequenceError, match="freed before"):
            use()


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


def test_the_cache_holds_one_copy_of_the_prefix():
    model = make_model()
    prefix_P, _ = make_group([1], prefix_length=20)
    cache = prefill(model, prefix_P)
    assert isinstance(cache, PrefixCache)
    assert cache.nbytes == 2 * 2 * 19 * 2 * 8 * 8  # K and V, 2 layers, 19 tokens, 2 heads, 8 dims, 8 bytes
