"""Attention in a packed stream, with an exact backward: what all layouts but that of decoding stand on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opsdl.prefix.attention import partial

ALONE = 256  # sequences of so many tokens attend to themselves one by one; shorter ones together, padded

Run = tuple[int, int]  # consecutive tokens: the first, and the one after the last


def take(x: Tensor, runs: Sequence[Run], dim: int) -> Tensor:
    """The tokens of these runs, one run after the other; a view where there is one run only."""
    if len(runs) == 1:
        return _part(x, runs[0], dim)
    return torch.cat([_part(x, run, dim) for run in runs], dim)


def put(x: Tensor, runs: Sequence[Run], dim: int, values: Tensor) -> None:
    """Write values, as `take` gives them, to the tokens of these runs."""
    for run, piece in _pieces(runs, dim, values):
        _part(x, run, dim).copy_(piece)


def add(x: Tensor, runs: Sequence[Run], dim: int, values: Tensor) -> None:
    """Add values, as `take` gives them, to those of these runs."""
    for run, piece in _pieces(runs, dim, values):
        _part(x, run, dim).add_(piece)


def _part(x: Tensor, run: Run, dim: int) -> Tensor:
    return x.narrow(dim, run[0], run[1] - run[0])


def _pieces(runs: Sequence[Run], dim: int, values: Tensor) -> Iterable[tuple[Run, Tensor]]:
    if len(runs) == 1:
        return [(runs[0], values)]
    return zip(runs, values.split([end - start for start, end in runs], dim), strict=True)


class Stream:
    """Who sees whom among packed tokens.

    Args:
        sequences: Runs that partition the stream; each of them sees itself causally.
        device: Where the stream is.
        inner: Pairs of runs: every token of the second sees all tokens of the first.
        readers: For each part of keys and values outside the stream, the runs whose tokens see all of it.
    """

    def __init__(
        self,
        sequences: Sequence[Run],
        device: torch.device,
        *,
        inner: Sequence[tuple[Run, Run]] = (),
        readers: Sequence[Sequence[Run]] = (),
    ) -> None:
        self.inner, self.readers = inner, readers
        short = [(start, end) for start, end in sequences if end - start < ALONE]
        self.short = _Padding(short, device) if len(short) > 1 else None
        self.alone = [(start, end) for start, end in sequences if self.short is None or end - start >= ALONE]

    def sources(
        self, key: Tensor, value: Tensor, outside: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Sequence[Run]]]:
        """All keys and values that are seen whole, each with the runs that see them: inner ones, then those outside."""
        for seen, reader in self.inner:
            yield take(key, [seen], 2), take(value, [seen], 2), [reader]
        yield from zip(outside[::2], outside[1::2], self.readers, strict=True)


class _Padding:
    """Moves between a stream [1, H, N, ...] and some of its runs side by side, padded [S, H, T, ...]."""

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        starts, lengths = torch.tensor([(start, end - start) for start, end in runs], device=device).T
        steps = torch.arange(int(lengths.max()), device=device)
        self.mask_ST = steps < lengths[:, None]
        self.slots_ST = torch.where(self.mask_ST, starts[:, None] + steps, 0)

    def pad(self, x_1HN: Tensor) -> Tensor:
        """Where a run has no token the stream's first one stands."""
        return x_1HN[0][:, self.slots_ST].transpose(0, 1)

    def put(self, x_1HN: Tensor, padded_SHT: Tensor) -> None:
        """Write the runs' tokens back to where `pad` took them from."""
        x_1HN[0][:, self.slots_ST[self.mask_ST]] = padded_SHT.transpose(0, 1)[:, self.mask_ST].to(x_1HN.dtype)

    def without_gaps(self, lse_SHT: Tensor) -> Tensor:
        """The lse of a backward: inf where a run has no token, so that its probabilities are exactly 0."""
        return lse_SHT.masked_fill(~self.mask_ST[:, None], torch.inf)


class StreamAttention(torch.autograd.Function):
    """Each sequence of a stream over itself and over what else it sees; states and sums in float32 at least.

    Keys that many tokens see are read once for all of them, and their dK and dV are summed in one piece. The backward
    of every part gets the merged out and lse (opsdl/prefix/attention/partial.py).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, stream: Stream, scale: float, *outside: Tensor
    ) -> Tensor:
        """Take query [1, Hq, N, D], key, value [1, Hkv, N, D] and key, value [1, Hkv, L, D] of each part outside."""
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        out, lse = query.new_empty(query.shape, dtype=wide), query.new_empty(query.shape[:3], dtype=wide)
        for run in stream.alone:
            own = _own_state(*(take(x, [run], 2) for x in (query, key, value)), scale=scale)
            put(out, [run], 2, own[0])
            put(lse, [run], 2, own[1])
        if (short := stream.short) is not None:
            own = _own_state(*(short.pad(x) for x in (query, key, value)), scale=scale)
            short.put(out, own[0])
            short.put(lse, own[1])
        for seen_key, seen_value, readers in stream.sources(key, value, outside):
            state = partial.attend(take(query, readers, 2), seen_key, seen_value, scale, causal=False)
            merged = partial.merge(take(out, readers, 2), take(lse, readers, 2), *state)
            put(out, readers, 2, merged[0])
            put(lse, readers, 2, merged[1])
        out = out.to(query.dtype)  # what the next layer keeps anyway
        ctx.save_for_backward(query, key, value, out, lse, *outside)
        ctx.stream, ctx.scale = stream, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *outside = ctx.saved_tensors
        stream, scale = ctx.stream, ctx.scale
        inputs = grad_out, query, key, value, out, lse
        grads = _own_gradients(inputs, stream, scale)
        grads_outside: list[Tensor | None] = []
        for index, (seen_key, seen_value, readers) in enumerate(stream.sources(key, value, outside)):
            number = index - len(stream.inner)  # of a part outside, from 0
            wanted = number < 0 or ctx.needs_input_grad[5 + 2 * number]  # False of a detached prefix
            grad, its_query, its_out, its_lse = (take(x, readers, 2) for x in (grad_out, query, out, lse))
            grad_query, *grad_seen = partial.attend_backward(
                grad, its_query, seen_key, seen_value, its_out, its_lse, scale, causal=False, key_value=wanted
            )
            add(grads[0], readers, 2, grad_query)
            if number >= 0:
                grads_outside += [x.to(query.dtype) if wanted else None for x in grad_seen]
                continue
            for total, x in zip(grads[1:], grad_seen, strict=True):
                add(total, [stream.inner[index][0]], 2, x)
        return *(x.to(query.dtype) for x in grads), None, None, *grads_outside


def _own_state(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    return partial.attend(query, key, value, scale, causal=True)


def _own_gradients(inputs: tuple[Tensor, ...], stream: Stream, scale: float) -> list[Tensor]:
    """dQ, dK and dV of the sequences' attention to themselves; inputs as `attend_backward` takes them."""
    grads = [x.new_empty(x.shape, dtype=inputs[-1].dtype) for x in inputs[1:4]]
    for run in stream.alone:
        grad_out, query, key, value, out, lse = (take(x, [run], 2) for x in inputs)
        own = partial.attend_backward(grad_out, query, key, value, out, lse, scale, causal=True)
        for grad, x in zip(grads, own, strict=True):
            put(grad, [run], 2, x)
    if (short := stream.short) is not None:
        grad_out, query, key, value, out, lse = (short.pad(x) for x in inputs)
        lse = short.without_gaps(lse)
        own = partial.attend_backward(grad_out, query, key, value, out, lse, scale, causal=True)
        for grad, x in zip(grads, own, strict=True):
            short.put(grad, x)
    return grads
