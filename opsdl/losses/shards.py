"""A vocabulary whose head rows are sharded over a process group: moments are combined exactly, gradients summed.

Every rank holds the same hidden states, masks and tokens, and its own consecutive rows of the head in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """Where this rank's rows lie, and sums over all ranks. Without a group: the whole vocabulary is here."""

    group: dist.ProcessGroup | None
    rows: int  # vocabulary entries of this rank
    start: int  # number of the first of them
    total: int  # vocabulary entries of all ranks
    largest: int  # vocabulary entries of the rank that has most

    @classmethod
    def of(cls, rows: int, group: dist.ProcessGroup | None, device: torch.device) -> Shards:
        """Ask every rank for its number of rows: one small collective."""
        if group is None:
            return cls(None, rows, 0, rows, rows)
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, torch.tensor([rows], device=device), group)
        sizes = [int(count) for count in counts]
        return cls(group, rows, sum(sizes[: dist.get_rank(group)]), sum(sizes), max(sizes))

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place where there are several."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def logsumexp(self, x_nV: Tensor) -> Tensor:
        """logsumexp over the whole vocabulary, [n, 1]."""
        lse_n1 = x_nV.logsumexp(-1, keepdim=True)
        if self.group is None:
            return lse_n1
        largest = lse_n1.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return largest + self.sum((lse_n1 - largest).exp_()).log_()

    def pick(self, x_nV: Tensor, tokens_n: Tensor) -> Tensor:
        """x[i, tokens[i]], from whichever rank has it: [n]."""
        local, here = self.locate(tokens_n)
        return self.sum(torch.where(here, x_nV.gather(1, local[:, None])[:, 0], 0.0))

    def locate(self, tokens_n: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each token on this rank, and whether it is here at all (column 0 where it is not)."""
        local = tokens_n - self.start
        here = (local >= 0) & (local < self.rows)
        return local.where(here, 0), here
