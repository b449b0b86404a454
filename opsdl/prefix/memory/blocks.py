"""Which block of a pool holds which tokens of which sequence: csrc/bindings/blocks.cpp, or the same in Python.

    ledger = BlockLedger(blocks=100, block_size=16)
    prefix = ledger.create()
    slots, copies = ledger.append([prefix], 40)     # copies: (from, to) blocks, before anything is written to the slots
    response = ledger.fork(prefix)                  # shares the 40 tokens; costs the same for any length
    ledger.free(prefix)                             # its blocks are held on, for the response

A slot is block * block_size + place. `append` gives all sequences room or raises OutOfBlocksError and changes nothing;
any use of a freed sequence raises FreedSequenceError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

try:
    from opsdl._blocks import BlockLedger, FreedSequenceError, OutOfBlocksError
except ImportError:  # the extension was not built
    BlockLedger = None


class _OutOfBlocksError(MemoryError):
    """There are fewer free blocks than an append needs."""


class _FreedSequenceError(RuntimeError):
    """A sequence was used after it was freed."""


@dataclass
class _Node:
    parent: int | None
    shared: int  # tokens of the parent that are its own too
    length: int
    holders: int = 1  # the sequence itself and its forks
    freed: bool = False
    own: list[int] = field(default_factory=list)  # blocks from the one that token `shared` is in


class PythonLedger:
    """BlockLedger where it is not compiled; errors are named as there."""

    def __init__(self, blocks: int, block_size: int):
        if blocks < 1 or block_size < 1:
            raise ValueError("BlockLedger: expected blocks and block_size above 0")
        self._blocks, self._size, self._free = blocks, block_size, list(range(blocks))[::-1]
        self._nodes: dict[int, _Node] = {}
        self._next = 0

    def create(self) -> int:
        return self._add(_Node(None, 0, 0))

    def fork(self, sequence: int) -> int:
        parent = self._get(sequence)
        parent.holders += 1
        return self._add(_Node(sequence, parent.length, parent.length))

    def append(self, sequences: Sequence[int], count: int) -> tuple[list[int], list[tuple[int, int]]]:
        if count < 0:
            raise ValueError("append: expected a count of 0 or more")
        if len(set(sequences)) < len(sequences):
            raise ValueError("append: a sequence is named twice")
        nodes = [self._get(sequence) for sequence in sequences]
        needed = sum(self._needed(node, count) for node in nodes)
        if needed > len(self._free):
            raise OutOfBlocksError(
                f"out of blocks: {needed} blocks of {self._size} tokens are needed, {len(self._free)} of {self._blocks}"
                " are free; free sequences, or give the pool more bytes"
            )
        slots, copies = [], []
        for node in nodes:
            first = node.shared // self._size
            if count and not node.own and node.shared % self._size:
                copies.append((self._table(node)[-1], self._take(node)))
            for _ in range(self._needed(node, count)):
                self._take(node)
            tokens = range(node.length, node.length + count)
            slots += [node.own[token // self._size - first] * self._size + token % self._size for token in tokens]
            node.length += count
        return slots, copies

    def blocks(self, sequence: int) -> list[int]:
        return self._table(self._get(sequence))

    def length(self, sequence: int) -> int:
        return self._get(sequence).length

    def free(self, sequence: int) -> None:
        self._get(sequence).freed = True
        held: int | None = sequence
        while held is not None:
            node = self._nodes[held]
            node.holders -= 1
            if node.holders:
                return
            self._free += node.own[::-1]
            del self._nodes[held]
            held = node.parent

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def _add(self, node: _Node) -> int:
        self._next += 1  # never used again, so that a stale one is noticed
        self._nodes[self._next - 1] = node
        return self._next - 1

    def _get(self, sequence: int) -> _Node:
        node = self._nodes.get(sequence)
        if node is None or node.freed:
            raise FreedSequenceError("the sequence was freed before")
        return node

    def _needed(self, node: _Node, count: int) -> int:
        return -(-(node.length + count) // self._size) - node.shared // self._size - len(node.own) if count else 0

    def _take(self, node: _Node) -> int:
        node.own.append(self._free.pop())
        return node.own[-1]

    def _table(self, node: _Node) -> list[int]:
        end = -(-node.length // self._size)
        out = [0] * end
        while True:
            first = node.shared // self._size
            if node.own:
                out[first:end] = node.own[: end - first]
                end = min(end, first)
            if not end or node.parent is None:
                return out
            node = self._nodes[node.parent]


if BlockLedger is None:
    BlockLedger, OutOfBlocksError, FreedSequenceError = PythonLedger, _OutOfBlocksError, _FreedSequenceError
