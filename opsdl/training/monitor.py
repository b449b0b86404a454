"""Watching a run: where a step's time goes, its memory, and stopping between steps."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from collections.abc import Iterator
from types import FrameType

import torch
from tqdm import tqdm


class Clock:
    """Seconds of each part of a step; time between two laps belongs to the part that the second one names."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start()

    def start(self) -> None:
        """Begin again at zero."""
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap for `part`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


@contextlib.contextmanager
def interrupt_after_step() -> Iterator[list[bool]]:
    """Ctrl-C and SIGTERM let the running step finish; a second one stops at once.

    Yields a list, empty until the first of them.
    """
    seen: list[bool] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(True)
        tqdm.write("stopping after this step; the next Ctrl-C stops at once, without saving it")

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def peak_memory_mib(device: torch.device) -> float:
    """The most this process has held so far: device memory on CUDA, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
