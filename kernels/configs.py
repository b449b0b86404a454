"""Tile sizes of each kernel by architecture and data type, chosen by hand, and the memory that the passes take.

Nothing is tuned at run time: every configuration here is compiled, checked for spills and executed by the tests. A tile
of moments holds two accumulators (student and gap) and a long epilogue, which limits it: 64 x 128 in 8 warps is the
largest that does not spill on sm_90 and sm_100, 64 x 64 on sm_80; 128 x 128 spills everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORKSPACE_BYTES = 32 << 20  # of logit gradients; dHidden's sums and the tokens' hidden states take as much at most
PROGRAMS = 4 * 132  # enough to fill an H100 four times over: the vocabulary is split until there are so many
MOMENTS_BYTES = 10 * 4  # of one token and split
GROUP = 16  # tiles of tokens that share what L2 holds of the vocabulary: bench/gpu_model.py counts what that saves


@dataclass(frozen=True)
class Tile:
    """The part of a product that a program computes, and with what resources."""

    rows: int  # of the result: tokens, or vocabulary entries for dWeight
    columns: int  # of the result: vocabulary entries, or hidden units
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """The tiles of one architecture and data type."""

    moments: Tile  # of the forward
    capped: Tile  # of either pass with a soft cap, whose epilogue is longer
    gradient: Tile  # of the backward
    product: Tile  # dHidden and dWeight from the workspace


# The gradient's products must be summed in the order of the moments', or p is of other logits than its lse.
_FLOAT32 = Config(*[Tile(64, 64, 16, 8, 2)] * 3, product=Tile(64, 64, 32, 8, 2))
_HALF = {  # by the major number of the compute capability; newer ones take the newest here
    8: Config(
        moments=Tile(64, 64, 32, 8, 4),
        capped=Tile(64, 64, 32, 8, 4),
        gradient=Tile(64, 128, 32, 8, 4),
        product=Tile(128, 128, 64, 8, 3),
    ),
    9: Config(
        moments=Tile(64, 128, 32, 8, 4),
        capped=Tile(64, 64, 64, 8, 3),
        gradient=Tile(64, 128, 64, 8, 3),
        product=Tile(128, 128, 64, 8, 3),
    ),
}
CONFIGS = {(major, dtype): _HALF[major] for major in _HALF for dtype in (torch.bfloat16, torch.float16)}
CONFIGS |= {(major, torch.float32): _FLOAT32 for major in _HALF}


def capability(device: torch.device) -> int:
    """Return the major number of the architecture that configurations are chosen for."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def config(dtype: torch.dtype, device: torch.device) -> Config:
    """Return the configuration for operands of this dtype on this device."""
    return CONFIGS[min(max(capability(device), 8), 9), dtype]


def splits(tokens: int, vocabulary: int, tile: Tile) -> int:
    """Return into how many parts the vocabulary is split for the programs of the forward.

    They are at least so many that GROUP tiles of tokens fill the machine, unless the moments would exceed
    WORKSPACE_BYTES.
    """
    token_tiles, vocabulary_tiles = -(-tokens // tile.rows), -(-vocabulary // tile.columns)
    wanted = max(PROGRAMS // token_tiles, PROGRAMS // (4 * GROUP))
    return max(1, min(vocabulary_tiles, wanted, WORKSPACE_BYTES // (MOMENTS_BYTES * tokens)))


def chunks(tokens: int, vocabulary: int, hidden: int, operand_bytes: int, tile: Tile) -> tuple[int, int]:
    """Return of how many tokens and vocabulary entries the logit gradients are in the workspace at a time."""
    rows = max(tile.rows, min(2048, WORKSPACE_BYTES // ((4 + operand_bytes) * hidden)) // tile.rows * tile.rows)
    columns = max(tile.columns, WORKSPACE_BYTES // (rows * operand_bytes) // tile.columns * tile.columns)
    return max(1, min(rows, tokens)), min(columns, vocabulary)


def workspace_bytes(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype, config: Config) -> int:
    """Return what the backward allocates besides dHidden and a float32 dWeight, in bytes.

    It is made up of logit gradients, sums of dHidden, and hidden states.
    """
    rows, columns = chunks(tokens, vocabulary, hidden, dtype.itemsize, config.gradient)
    return rows * columns * dtype.itemsize + rows * hidden * (4 + dtype.itemsize)


def moments_bytes(tokens: int, vocabulary: int, config: Config) -> int:
    """Return what the forward allocates, in bytes."""
    return MOMENTS_BYTES * tokens * splits(tokens, vocabulary, config.moments)
