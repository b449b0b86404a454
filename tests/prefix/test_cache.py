"""Prefix caches in the blocks of a pool: contents, budget, rollouts, transformers' generate, faults."""

import pytest
import torch

from opsdl.prefix import (
    FreedSequence,
    KeyValuePool,
    OutOfBlocks,
    StalePrefixError,
    as_transformers,
    detach,
    generate,
    prefill,
    response_hidden,
)
from tests.support.models import VOCABULARY, make_group, make_model

EOS = 7


def token_bytes(prefix):
    return sum(x[:, :, :1].nbytes for pair in prefix.layers.values() for x in pair)


def rollout(model, prefix, seed=0, **changes):
    options = dict(num_responses=8, max_new_tokens=12, temperature=1.0, eos_token_id=[EOS, 3])
    return generate(model, prefix, **{**options, **changes}, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return all(torch.equal(x, y) for x, y in ((a.tokens, b.tokens), (a.mask, b.mask), (a.log_probs, b.log_probs)))


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


def test_eight_rollouts_hold_one_prefix_and_leave_nothing_behind():
    model = make_model()
    ids, _ = make_group([1], prefix_length=41)
    pool = KeyValuePool(1 << 20)
    prefix = prefill(model, ids, pool=pool)
    held, most = pool.held_bytes, 0
    extend = pool.extend

    def watched(*arguments):
        nonlocal most
        out = extend(*arguments)
        most = max(most, pool.held_bytes)
        return out

    pool.extend = watched
    rollout(model, prefix, max_new_tokens=4, eos_token_id=VOCABULARY + 1)
    # 40 tokens in three blocks; each row has one block: a copy of the half full last one, and room for its own tokens.
    assert held == 48 * token_bytes(prefix) and most == held + 8 * 16 * token_bytes(prefix)
    assert pool.held_bytes == held
    prefix.free()
    assert pool.held_bytes == 0


def test_a_prefix_in_scattered_blocks_is_read_where_it_lies(monkeypatch):
    model = make_model()
    ids, _ = make_group([1], prefix_length=40)
    pool = KeyValuePool(1 << 20)
    first, second = (prefill(model, make_group([1], prefix_length=20, seed=n)[0], pool=pool) for n in (1, 2))
    first.free()
    prefix = prefill(model, ids, pool=pool)
    blocks = pool.table(prefix.sequence).tolist()
    assert blocks != list(range(blocks[0], blocks[0] + len(blocks)))
    expected = rollout(model, prefill(model, ids))
    monkeypatch.setattr(pool, "layers", None)  # which would copy them
    assert same(rollout(model, prefix), expected)


def test_rows_that_end_give_their_blocks_to_the_others():
    model = make_model()
    ids, _ = make_group([1], prefix_length=17)
    token = token_bytes(prefill(model, ids))
    ends = list(range(0, VOCABULARY, 3))  # a third of the tokens
    pool = KeyValuePool(token * 16 * 10)  # one block for the prefix, nine for eight rows
    prefix = prefill(model, ids, pool=pool)
    responses = rollout(model, prefix, max_new_tokens=20, eos_token_id=ends)
    assert max(responses.lengths) > 1 and pool.held_bytes == 16 * token
    with pytest.raises(OutOfBlocks, match="out of blocks"):
        rollout(model, prefix, max_new_tokens=40, eos_token_id=VOCABULARY + 1)
    assert pool.held_bytes == 16 * token  # what the rows had is free again
    with pytest.raises(OutOfBlocks):
        prefill(model, make_group([1], prefix_length=64)[0].repeat(3)[:64], pool=KeyValuePool(token * 16))
    with pytest.raises(ValueError, match="a budget of 10 bytes"):
        prefill(model, ids, pool=KeyValuePool(10))


@pytest.mark.parametrize("attached", [True, False])
def test_transformers_generates_from_the_cache(attached):
    model = make_model()
    ids, _ = make_group([1], prefix_length=23)
    rows = ids.expand(4, -1)
    options = dict(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=VOCABULARY + 1)
    expected = model.generate(rows, attention_mask=torch.ones_like(rows), **options)
    prefix = prefill(model, ids, pool=KeyValuePool(1 << 20))
    if not attached:
        detach(model)
    before = [x.clone() for pair in prefix.layers.values() for x in pair]
    cache = as_transformers(model, prefix, rows=4)
    got = model.generate(rows, attention_mask=torch.ones_like(rows), past_key_values=cache, **options)
    assert torch.equal(got, expected)
    assert all(torch.equal(x, y) for x, y in zip(before, (x for p in prefix.layers.values() for x in p), strict=True))
    own = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert own == 4 * 9 * token_bytes(prefix)
    torch.manual_seed(0)
    sampled = model.generate(
        rows, attention_mask=torch.ones_like(rows), past_key_values=as_transformers(model, prefix, rows=4),
        **{**options, "do_sample": True},
    )  # fmt: skip
    assert sampled.shape == (4, 32) and len({tuple(row) for row in sampled.tolist()}) > 1


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
        with pytest.raises(FreedSequence, match="freed before"):
            use()


def test_operators_refuse_what_lies_outside():
    pool, tokens = torch.zeros(3, 4, 2, 8), torch.randn(2, 2, 8)
    write, gather, copy = (getattr(torch.ops.opsdl, x) for x in ("append_tokens", "gather_tokens", "copy_blocks"))
    write(pool, tokens, torch.tensor([11, 4]))
    assert torch.equal(pool[2, 3], tokens[0]) and torch.equal(pool[1, 0], tokens[1])
    assert torch.equal(gather(pool, torch.tensor([1, 2]), 8).view(2, 4, 2, 8), pool[1:])
    copy(pool, torch.tensor([1]), torch.tensor([0]))
    assert torch.equal(pool[0], pool[1])
    for call in (
        lambda: write(pool, tokens, torch.tensor([12, 0])),
        lambda: write(pool, tokens, torch.tensor([-1, 0])),
        lambda: write(pool, tokens, torch.tensor([0])),
        lambda: write(pool, tokens.double(), torch.tensor([0, 1])),
        lambda: gather(pool, torch.tensor([3]), 4),
        lambda: gather(pool, torch.tensor([0]), 5),
        lambda: copy(pool, torch.tensor([3]), torch.tensor([0])),
        lambda: copy(pool, torch.tensor([0]), torch.tensor([3])),
    ):
        with pytest.raises(RuntimeError):
            call()
