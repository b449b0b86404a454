"""Decoding: which blocks responses hold, and how often what they share is read."""

import pytest
import torch

from opsdl.prefix import KeyValuePool, OutOfBlocksError, extend, prefill
from opsdl.prefix.attention import states
from tests.support.models import VOCABULARY, make_group, make_model, rollout, same, token_bytes


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
    # 40 tokens in three blocks; each response has one block: a copy of the half full last one, with room for its own.
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
    blocks = prefix.parts[0].table.tolist()
    assert blocks != list(range(blocks[0], blocks[0] + len(blocks)))
    expected = rollout(model, prefill(model, ids))
    monkeypatch.setattr(pool, "layers", None)  # which would copy them
    assert same(rollout(model, prefix), expected)


def test_responses_that_end_give_their_blocks_to_the_others():
    model = make_model()
    ids, _ = make_group([1], prefix_length=17)
    token = token_bytes(prefill(model, ids))
    ends = list(range(0, VOCABULARY, 3))  # a third of the tokens
    pool = KeyValuePool(token * 16 * 10)  # one block for the prefix, nine for eight responses
    prefix = prefill(model, ids, pool=pool)
    responses = rollout(model, prefix, max_new_tokens=20, eos_token_id=ends)
    assert max(responses.lengths) > 1 and pool.held_bytes == 16 * token
    with pytest.raises(OutOfBlocksError, match="out of blocks"):
        rollout(model, prefix, max_new_tokens=40, eos_token_id=VOCABULARY + 1)
    assert pool.held_bytes == 16 * token  # what the responses had is free again
    with pytest.raises(OutOfBlocksError):
        prefill(model, make_group([1], prefix_length=64)[0].repeat(3)[:64], pool=KeyValuePool(token * 16))
    with pytest.raises(ValueError, match="a budget of 10 bytes"):
        prefill(model, ids, pool=KeyValuePool(10))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_shared_document_is_read_once_a_step_for_all_questions(monkeypatch, pooled):
    """Two questions on one document and a prompt of its own: four parts a layer and step, each for all its readers."""
    model = make_model()
    ids, _ = make_group([1], prefix_length=20)
    other, _ = make_group([1], prefix_length=9, seed=1)
    pool = KeyValuePool(1 << 20) if pooled else None
    document = prefill(model, ids, pool=pool)
    first, second = extend(model, document, [torch.cat([ids, other[:n]]) for n in (3, 5)])
    reads, real = [], states.prefix_decode

    def counted(query_RHD, *arguments, length, **options):
        reads.append((len(query_RHD), length))
        return real(query_RHD, *arguments, length=length, **options)

    monkeypatch.setattr(states, "prefix_decode", counted)
    caches = [first, prefill(model, other, pool=pool), second]
    rollout(model, caches, num_responses=4, max_new_tokens=1)
    assert sorted(reads) == sorted(2 * [(8, 19), (4, 3), (4, 5), (4, 8)])  # two layers
