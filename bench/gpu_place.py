"""Where bench/gpu_check.py runs: on the GPU, or on the CPU with tiny shapes to see that the script itself works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.harness import Clock, cuda_clock, wall_clock


@dataclass(frozen=True)
class Place:
    """A device, and sizes that it can take.

    Attributes:
        device: Where the tensors are made.
        backend: The loss backend under test.
        dry: Whether this stands for a GPU.
        clock: How a step is timed.
        checked: N tokens, H hidden size, V entries of the losses' errors: whole multiples of no tile.
        loss_shapes: N, H, V of the losses' times.
        decode_shape: R responses, Hq and Hkv heads, D head dim, L keys of the times of decoding.
    """

    device: str
    backend: str
    dry: bool
    clock: Clock
    checked: tuple[int, int, int]
    loss_shapes: tuple[tuple[int, int, int], ...]
    decode_shape: tuple[int, int, int, int, int]

    def draw(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Standard normal float32 numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device)

    def integers(self, below: int, count: int) -> torch.Tensor:
        """int64 [count] in [0, below)."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randint(below, (count,), generator=generator, device=self.device)

    def peak_bytes(self, step: Callable[[], object]) -> int | None:
        """Run the step once; the most memory allocated beyond what was before, where the device counts it."""
        if self.device != "cuda":
            step()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def forget(self) -> None:
        """Give unused memory back."""
        if self.device == "cuda":
            torch.cuda.empty_cache()


GPU = Place(
    device="cuda",
    backend="triton",
    dry=False,
    clock=cuda_clock,
    checked=(300, 520, 5003),
    loss_shapes=((8192, 4096, 128256), (8192, 2048, 151936), (1024, 1024, 32000)),
    decode_shape=(8, 32, 8, 128, 131072),
)
CPU_IN_ITS_PLACE = Place(
    device="cpu",
    backend="torch",
    dry=True,
    clock=wall_clock,
    checked=(9, 24, 103),
    loss_shapes=((16, 32, 200),),
    decode_shape=(2, 4, 2, 64, 130),
)
