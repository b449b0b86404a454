"""Keys and values of many sequences in blocks: what a fork shares is held once, what is freed is used again.

pool = KeyValuePool(budget_bytes=2 << 30)
prefix = prefill(model, prefix_ids, pool=pool)             # in blocks of the pool
responses = generate(model, prefix, num_responses=8, ...)  # forks: one copy of the prefix, own tokens in blocks
prefix.free()
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsdl.prefix.attention.operators import fallback
from opsdl.prefix.attention.partial import KeyValue
from opsdl.prefix.memory.blocks import BlockLedger


class KeyValuePool:
    """Blocks of tokens within a budget of bytes, over all layers of one model.

    The tensors [blocks, block_size, Hkv, D] are made at the first use, which says how many layers, heads and numbers
    there are; later uses must agree.

    Args:
        budget_bytes: What all blocks may take together.
        block_size: Tokens of a block.

    Raises:
        OutOfBlocksError: A MemoryError, where an append does not fit; nothing is written then.
        FreedSequenceError: A RuntimeError, where a freed sequence is used.
        ValueError: A budget below one block, or keys and values of another form than those before.
    """

    def __init__(self, budget_bytes: int, *, block_size: int = 16) -> None:
        self.budget_bytes, self.block_size = budget_bytes, block_size
        self._layers: dict[int, KeyValue] = {}  # all blocks of keys and of values
        self._made_ledger: BlockLedger | None = None

    @classmethod
    def of(cls, like: dict[int, KeyValue], sequences: int, tokens: int, *, block_size: int = 16) -> KeyValuePool:
        """A pool with room for so many sequences of so many tokens, of keys and values like these."""
        blocks = sequences * -(-tokens // block_size)
        pool = cls(blocks * block_size * _token_bytes(like), block_size=block_size)
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
        block_bytes = _token_bytes(like) * self.block_size
        blocks = self.budget_bytes // block_bytes
        if blocks < 1:
            raise ValueError(f"pool: a budget of {self.budget_bytes} bytes; expected {block_bytes}, a block, at least")

        def empty(x: Tensor) -> Tensor:
            return x.new_empty(blocks, self.block_size, x.shape[1], x.shape[3], requires_grad=False)

        self._made_ledger, self.blocks = BlockLedger(blocks, self.block_size), blocks
        self._layers = {layer: (empty(key), empty(value)) for layer, (key, value) in like.items()}

    @property
    def _ledger(self) -> BlockLedger:
        if self._made_ledger is None:
            raise RuntimeError("pool: nothing was stored yet; expected `store` or `adopt` before")
        return self._made_ledger

    @property
    def token_bytes(self) -> int:
        """The bytes of one token's keys and values in all layers."""
        return sum(x[0, 0].nbytes for pair in self._layers.values() for x in pair)

    @property
    def held_bytes(self) -> int:
        """The bytes of the blocks that hold tokens."""
        if self._made_ledger is None:
            return 0
        return (self.blocks - self._made_ledger.free_blocks) * self.block_size * self.token_bytes

    def store(self, layers: dict[int, KeyValue]) -> int:
        """Make a sequence of these keys and values [1, Hkv, L, D]. Returns it."""
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
        """Make an empty sequence; `adopt` must have been called. Returns it."""
        return self._ledger.create()

    def fork(self, sequence: int) -> int:
        """Make a sequence that shares all tokens of this one, at a cost that does not depend on their number."""
        return self._ledger.fork(sequence)

    def free(self, sequences: Sequence[int]) -> None:
        """Give the blocks back, but for those that forks share. Frees none if one of them was freed before."""
        for sequence in sequences:
            self._ledger.length(sequence)
        for sequence in sequences:
            self._ledger.free(sequence)

    def extend(self, sequences: Sequence[int], count: int) -> Tensor:
        """Make room for `count` more tokens in each sequence. Returns their slots, int64 [len(sequences) * count]."""
        slots, copies = self._ledger.append(list(sequences), count)
        if copies:
            sources, targets = torch.tensor(copies, device=self._device).T.contiguous()
            for blocks in (x for pair in self._layers.values() for x in pair):
                torch.ops.opsdl.copy_blocks(blocks, sources, targets)
        return torch.tensor(slots, dtype=torch.int64, device=self._device)

    def write(self, layer: int, slots_N: Tensor, key_NHD: Tensor, value_NHD: Tensor) -> None:
        """Put tokens into slots that `extend` gave."""
        slots_N = slots_N.contiguous()
        for blocks, tokens in zip(self._layers[layer], (key_NHD, value_NHD), strict=True):
            torch.ops.opsdl.append_tokens(blocks, tokens.detach(), slots_N)

    def at(self, layer: int, slots_RT: Tensor) -> KeyValue:
        """The keys and values [R, Hkv, T, D] of these slots, copied."""
        key, value = (blocks.flatten(0, 1)[slots_RT].transpose(1, 2) for blocks in self._layers[layer])
        return key, value

    def storage(self, layer: int) -> KeyValue:
        """All blocks of keys and of values [blocks, block_size, Hkv, D]."""
        return self._layers[layer]

    def length(self, sequence: int) -> int:
        """The number of tokens of a sequence. Raises FreedSequenceError if it was freed."""
        return self._ledger.length(sequence)

    def table(self, sequence: int) -> Tensor:
        """The blocks that hold a sequence, in their order, int32."""
        return torch.tensor(self._ledger.blocks(sequence), dtype=torch.int32).to(self._device)

    def layers(self, sequence: int) -> dict[int, KeyValue]:
        """Keys and values [1, Hkv, L, D] of a sequence: where they lie if its blocks are consecutive, else copied."""
        numbers, length = self._ledger.blocks(sequence), self._ledger.length(sequence)
        if not numbers:
            raise ValueError("pool: the sequence is empty; expected a token at least")
        consecutive = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        table = self.table(sequence)

        def read(blocks: Tensor) -> Tensor:
            if consecutive:
                tokens_LHD = blocks[numbers[0] : numbers[-1] + 1].flatten(0, 1)[:length]
            else:
                tokens_LHD = torch.ops.opsdl.gather_tokens(blocks, table, length)
            return tokens_LHD.transpose(0, 1)[None]

        return {layer: (read(keys), read(values)) for layer, (keys, values) in self._layers.items()}

    @property
    def _device(self) -> torch.device:
        return next(iter(self._layers.values()))[0].device


def _form(x_1HLD: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    return x_1HLD.shape[1], x_1HLD.shape[3], x_1HLD.dtype, x_1HLD.device


def _token_bytes(like: dict[int, KeyValue]) -> int:
    return sum(x.shape[1] * x.shape[3] * x.element_size() for pair in like.values() for x in pair)


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
