"""The layout of a tree of segments in one stream, depth first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsdl.prefix.layouts.stream import Stream, StreamAttention


@dataclass(frozen=True)
class Span:
    """Where a segment and what follows it are in the stream, whose descendants come right after its own tokens."""

    start: int
    end: int  # of its own tokens
    last: int  # of its descendants' tokens


class TreeLayout:
    """Each segment over itself, causally, and over all tokens of its ancestors."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        inner = [((span.start, span.end), (span.end, span.last)) for span in spans if span.last > span.end]
        self.stream = Stream([(span.start, span.end) for span in spans], device, inner=inner)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return StreamAttention.apply(query, key, value, self.stream, scale)
