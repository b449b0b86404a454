"""Keys and values of many sequences in blocks: what a fork shares is held once, what is freed is used again.

pool = KeyValuePool(budget_bytes=2 << 30)
prefix = prefill(model, prefix_ids, pool=pool)         # in blocks of the pool
responses = generate(model, prefix, num_responses=8, ...)  # forks: one copy of the prefix, own tokens in blocks
prefix.free()
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsdl.prefix.attention.operators import fallback
from opsdl.prefix.memory.blocks import BlockLedger, FreedSequence, OutOfBlocks
from opsdl.prefix.responses import KeyValue

__all__ = ["FreedSequence", "KeyValuePool", "OutOfBlocks"]


class KeyValuePool:
    """Blocks of `block_size` tokens within `budget_bytes`, over all layers of one model.

    The tensors [blocks, block_size, Hkv, D] are made at the first use, which says how many layers, heads and numbers
    there are; later uses must agree. Raises OutOfBlocks (a MemoryError) where an append does not fit, before
    anything is written, FreedSequence (a RuntimeError) for a freed sequence, ValueError for a budget below one block.
    """

    def __init__(self, budget_bytes: int, *, block_size: int = 16):
        self.budget_bytes, self.block_size = budget_bytes, block_size
        self._layers: dict[int, KeyValue] = {}  # pools of keys and of values
        self._ledger: BlockLedger | None = None

    @classmethod
    def of(cls, like: dict[int, KeyValue], sequences: int, tokens: int, *, block_size: int = 16) -> KeyValuePool:
        """Room for so many sequences of so many tokens, of keys and values like these."""
        token_bytes = sum(x.shape[1] * x.shape[3] * x.element_size() for pair in like.values() for x in pair)
        blocks = sequences * -(-tokens // block_size)
        pool = cls(blocks * block_size * token_bytes, block_size=block_size)
        pool.adopt(like)
        return pool

    def adopt(self, like: dict[int, KeyValue]) -> None:
        """Take the form of these keys and values [1, Hkv, *, D], or raise ValueError if the pool has another."""
        wanted = {layer: [_form(x) for x in pair] for layer, pair in like.items()}
        if not self._layers:
            self._make(like)
        held = {layer: [_form(x.transpose(1, 2)) for x in pair] for layer, pair in self._layers.items()}
        if wanted != held:
            layer = next(layer for layer in {**wanted, **held} if wanted.get(layer) != held.get(layer))
            raise ValueError(
                f"pool: layer {layer} holds (heads, size, dtype, device) {held.get(layer)}, found {wanted.get(layer)};"
                " expected keys and values of one model"
            )

    def _make(self, like: dict[int, KeyValue]) -> None:
        block_bytes = sum(x.shape[1] * x.shape[3] * x.element_size() for pair in like.values() for x in pair)
        block_bytes *= self.block_size
        blocks = self.budget_bytes // block_bytes
        if blocks < 1:
            raise ValueError(f"pool: a budget of {self.budget_bytes} bytes; expected {block_bytes}, a block, at least")
        self._ledger, self.block_bytes = BlockLedger(blocks, self.block_size), block_bytes
        for layer, pair in like.items():
            self._layers[layer] = tuple(
                x.new_empty(blocks, self.block_size, x.shape[1], x.shape[3], requires_grad=False) for x in pair
            )
        self.blocks = blocks

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks that hold tokens."""
        return 0 if self._ledger is None else (self.blocks - self._ledger.free_blocks) * self.block_bytes

    def store(self, layers: dict[int, KeyValue]) -> int:
        """A new sequence with these keys and values [1, Hkv, L, D]. Returns it."""
        self.adopt(layers)
        sequence = self._ledger.create()
        try:
            slots = self.extend([sequence], next(iter(layers.values()))[0].shape[2])
            for layer, (key, value) in layers.items():
                self.write(layer, slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        except BaseException:
            self._ledger.free(sequence)
            raise
        return sequence

    def create(self) -> int:
        """A new, empty sequence; `adopt` must have been called."""
        return self._ledger.create()

    def fork(self, sequence: int) -> int:
        """A sequence that shares all tokens of this one, at a cost that does not depend on their number."""
        return self._ledger.fork(sequence)

    def free(self, sequences: Sequence[int]) -> None:
        """Give the blocks back, but for those that forks share. Frees none if one of them was freed before."""
        for sequence in sequences:
            self._ledger.length(sequence)
        for sequence in sequences:
            self._ledger.free(sequence)

    def extend(self, sequences: Sequence[int], count: int) -> Tensor:
        """Room for `count` more tokens in each sequence. Returns their slots, int64 [len(sequences) * count]."""
        slots, copies = self._ledger.append(list(sequences), count)
        device = self._layers[next(iter(self._layers))][0].device
        if copies:
            sources, targets = torch.tensor(copies, device=device).T.contiguous()
            for pool in (x for pair in self._layers.values() for x in pair):
                torch.ops.opsdl.copy_blocks(pool, sources, targets)
        return torch.tensor(slots, dtype=torch.int64, device=device)

    def write(self, layer: int, slots_N: Tensor, key_NHD: Tensor, value_NHD: Tensor) -> None:
        """Put tokens into slots that `extend` gave."""
        slots_N = slots_N.contiguous()
        for pool, tokens in zip(self._layers[layer], (key_NHD, value_NHD), strict=True):
            torch.ops.opsdl.append_tokens(pool, tokens.detach(), slots_N)

    def at(self, layer: int, slots_RT: Tensor) -> KeyValue:
        """Keys and values [R, Hkv, T, D] of these slots."""
        return tuple(pool.flatten(0, 1)[slots_RT].transpose(1, 2) for pool in self._layers[layer])

    def pools(self, layer: int) -> KeyValue:
        """All blocks of keys and of values [blocks, block_size, Hkv, D]."""
        return self._layers[layer]

    def table(self, sequence: int) -> Tensor:
        """int32: the blocks that hold a sequence, in their order."""
        blocks = torch.tensor(self._ledger.blocks(sequence), dtype=torch.int32)
        return blocks.to(next(iter(self._layers.values()))[0].device)

    def layers(self, sequence: int) -> dict[int, KeyValue]:
        """Keys and values [1, Hkv, L, D] of a sequence: where they lie if its blocks are consecutive, else copied."""
        blocks, length = self._ledger.blocks(sequence), self._ledger.length(sequence)
        if not blocks:
            raise ValueError("pool: the sequence is empty; expected a token at least")
        if blocks == list(range(blocks[0], blocks[0] + len(blocks))):

            def read(pool):
                return pool[blocks[0] : blocks[-1] + 1].flatten(0, 1)[:length]
        else:
            table = self.table(sequence)

            def read(pool):
                return torch.ops.opsdl.gather_tokens(pool, table, length)

        return {layer: tuple(read(x).transpose(0, 1)[None] for x in pair) for layer, pair in self._layers.items()}


def _form(x_1HLD: Tensor) -> tuple:
    return x_1HLD.shape[1], x_1HLD.shape[3], x_1HLD.dtype, x_1HLD.device


@fallback("append_tokens")
def _append(pool: Tensor, tokens: Tensor, slots: Tensor) -> None:
    _within("append_tokens", slots, pool.shape[0] * pool.shape[1])
    if tokens.shape != (len(slots), *pool.shape[2:]) or tokens.dtype != pool.dtype:
        raise RuntimeError(
            f"append_tokens: tokens are {tokens.dtype} {tuple(tokens.shape)} for {len(slots)} slots of a pool"
            f" {pool.dtype} {tuple(pool.shape)}"
        )
    pool.flatten(0, 1)[slots] = tokens


@fallback("gather_tokens")
def _gather(pool: Tensor, block_table: Tensor, length: int) -> Tensor:
    _within("gather_tokens", block_table, len(pool))
    if not 0 <= length <= len(block_table) * pool.shape[1]:
        raise RuntimeError(f"gather_tokens: length is {length} of {len(block_table)} blocks of {pool.shape[1]}")
    return pool[block_table.long()].flatten(0, 1)[:length]


@fallback("copy_blocks")
def _copy(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    _within("copy_blocks", torch.cat([sources, targets]), len(pool))
    pool[targets] = pool[sources]


def _within(name: str, indices: Tensor, limit: int) -> None:
    low, high = (int(indices.min()), int(indices.max())) if len(indices) else (0, 0)
    if low < 0 or high >= limit:
        raise RuntimeError(f"{name}: indices from {low} to {high}; expected 0 to {limit - 1}")
