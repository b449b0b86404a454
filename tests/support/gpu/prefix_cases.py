"""Small random inputs for the kernels of csrc/cuda, and the answers in float64."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parents[3] / "csrc" / "cuda"
SCALE = 0.3  # as in tests/gpu_evidence/cuda/host.cpp
# Probabilities are rounded to the operands' type once; scores and sums are float32.
LIMIT = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def missing(program: str) -> str | None:
    """Why a test that needs this compiler is skipped."""
    return None if shutil.which(program) else f"no {program} here"


@dataclass
class DecodeCase:
    """R queries of Hq heads over `length` keys of Hkv heads of D numbers.

    The keys lie in the blocks of a pool, or one after another where block_size is 0.
    """

    dtype: torch.dtype
    R: int
    Hq: int
    Hkv: int
    D: int
    length: int
    block_size: int
    keys_per_split: int
    seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(self.dtype)  # noqa: E731
        self.query, key, value = draw(self.R, self.Hq, self.D), *(draw(self.length, self.Hkv, self.D) for _ in range(2))
        self.dense = key, value
        self.table, self.key, self.value = torch.empty(0, dtype=torch.int32), key, value
        if self.block_size:
            count = -(-self.length // self.block_size)
            self.table = torch.randperm(count + 3, generator=generator)[:count].to(torch.int32)
            self.key, self.value = (draw(count + 3, self.block_size, self.Hkv, self.D) for _ in range(2))
            for t in range(self.length):
                block, place = int(self.table[t // self.block_size]), t % self.block_size
                self.key[block, place], self.value[block, place] = key[t], value[t]

    @property
    def width(self) -> int:
        return 64 if self.D <= 64 else 128

    @property
    def splits(self) -> int:
        return -(-self.length // self.keys_per_split)

    @property
    def sizes(self) -> list[int]:
        blocks = len(self.key) if self.block_size else 0
        return [self.R, self.Hq, self.Hkv, self.D, self.length, self.block_size, blocks, self.keys_per_split]

    @property
    def strides(self) -> list[int]:
        """The strides of a token, a head and a block."""
        *block, token, head, _ = self.key.stride()
        return [token, head, block[0] if block else 0]

    def check(self, outs: Tensor, lses: Tensor) -> None:
        """outs [splits, R, Hq, D] and lses [splits, R, Hq] against dense attention."""
        outs = outs.view(self.splits, *self.query.shape).double()
        lses = lses.view(self.splits, self.R, self.Hq).double()
        key, value = (x.double().repeat_interleave(self.Hq // self.Hkv, 1) for x in self.dense)
        scores = torch.einsum("rhd,lhd->rhl", self.query.double(), key) * SCALE
        for split in range(self.splits):
            part = slice(split * self.keys_per_split, (split + 1) * self.keys_per_split)
            expected = torch.einsum("rhl,lhd->rhd", scores[..., part].softmax(-1), value[part])
            error = float((outs[split] - expected).norm() / expected.norm())
            assert error <= LIMIT[self.dtype], f"split {split}: error {error:.1e}"
            assert torch.allclose(lses[split], scores[..., part].logsumexp(-1), rtol=1e-5, atol=1e-5)


DECODE_CASES = [
    DecodeCase(torch.bfloat16, 3, 8, 2, 64, 150, 0, 128),
    DecodeCase(torch.bfloat16, 20, 4, 1, 128, 70, 0, 128, seed=1),  # two tiles of queries
    DecodeCase(torch.float16, 8, 2, 2, 40, 193, 16, 64, seed=2),
    DecodeCase(torch.bfloat16, 1, 1, 1, 80, 65, 32, 64, seed=3),
    DecodeCase(torch.float32, 5, 6, 3, 64, 100, 16, 64, seed=4),
    DecodeCase(torch.float32, 34, 2, 2, 128, 33, 0, 64, seed=5),
]


def states(S: int, rows: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """outs, lses with parts and rows that hold nothing."""
    generator = torch.Generator().manual_seed(seed)
    outs, lses = torch.randn(S, rows, D, generator=generator), 4 * torch.randn(S, rows, generator=generator)
    lses[0, 0], lses[:, rows // 2], lses[-1, -1] = -torch.inf, -torch.inf, torch.inf
    return torch.where(lses.isinf()[..., None], torch.nan, outs), lses


def check_merged(given: tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> None:
    outs, lses = (x.double() for x in given)
    empty = lses.isinf()
    outs = outs.masked_fill(empty[..., None], 0)
    expected_lse = lses.masked_fill(empty, -torch.inf).logsumexp(0)
    weights = torch.where(empty, 0.0, (lses - expected_lse).exp())
    expected = (weights[..., None] * outs).sum(0)
    assert (out.double() - expected).norm() <= 1e-6 * expected.norm()
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
