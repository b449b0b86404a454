"""A vocabulary that is sharded over a process group: moments are combined exactly, gradients summed.

Every rank holds the same hidden states, masks and tokens, and its own consecutive entries of the head in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """Where this rank's entries lie, and sums over all ranks. Without a group the whole vocabulary is here."""

    group: dist.ProcessGroup | None
    entries: int  # vocabulary entries of this rank
    start: int  # number of the first of them
    total: int  # vocabulary entries of all ranks
    largest: int  # vocabulary entries of the rank that has most

    @classmethod
    def of(cls, entries: int, group: dist.ProcessGroup | None, device: torch.device) -> Shards:
        """Ask every rank for its number of entries, in one small collective."""
        if group is None:
            return cls(None, entries, 0, entries, entries)
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, torch.tensor([entries], device=device), group)
        sizes = [int(count) for count in counts]
        return cls(group, entries, sum(sizes[: dist.get_rank(group)]), sum(sizes), max(sizes))

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks, in place where there are several."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over ranks, weighted by their vocabulary entries."""
        return self.sum(x * (self.entries / self.total)) if self.group is not None else x

    def gather(self, part_fn: Tensor) -> Tensor:
        """Return every rank's [f, n] side by side: [f, ranks, n]."""
        if self.group is None:
            return part_fn[:, None]
        parts = [torch.empty_like(part_fn) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, part_fn.contiguous(), self.group)
        return torch.stack(parts, dim=1)
