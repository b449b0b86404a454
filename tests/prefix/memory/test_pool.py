"""The pool of blocks: what it writes, copies and refuses."""

import pytest
import torch

from opsdl.prefix import KeyValuePool, OutOfBlocksError


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


def test_a_fork_that_goes_on_copies_the_tokens_before_it():
    """Copy-on-write: the half-full last block, with what is in it; neither sees what the other adds."""
    pool = KeyValuePool(1 << 20, block_size=4)
    shared, ours, theirs = (
        {layer: (torch.randn(1, 2, n, 8), torch.randn(1, 2, n, 8)) for layer in (0, 1)} for n in (6, 3, 5)
    )
    prefix = pool.store(shared)
    fork = pool.fork(prefix)
    for sequence, more in ((fork, ours), (prefix, theirs)):
        slots = pool.extend([sequence], more[0][0].shape[2])
        for layer, pair in more.items():
            pool.write(layer, slots, *(x[0].transpose(0, 1) for x in pair))
    for sequence, more in ((fork, ours), (prefix, theirs)):
        for layer, pair in pool.layers(sequence).items():
            expected = [torch.cat(two, 2) for two in zip(shared[layer], more[layer], strict=True)]
            assert all(torch.equal(x, y) for x, y in zip(pair, expected, strict=True))
    assert pool.length(prefix) == 11 and pool.length(fork) == 9
    assert pool.held_bytes == (3 + 2) * 4 * pool.token_bytes  # the fork has a copy of the second block and a third


def test_faults():
    pool = KeyValuePool(10)
    assert pool.held_bytes == 0
    with pytest.raises(RuntimeError, match="nothing was stored yet"):
        pool.create()
    layers = {0: (torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))}
    with pytest.raises(ValueError, match="a budget of 10 bytes"):
        pool.store(layers)
    pool = KeyValuePool.of(layers, 2, 16)
    with pytest.raises(ValueError, match="the sequence is empty"):
        pool.layers(pool.create())
    with pytest.raises(OutOfBlocksError, match="out of blocks"):
        pool.extend([pool.create()], 33)
    assert pool.held_bytes == 0
