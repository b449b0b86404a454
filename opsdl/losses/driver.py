"""The order of work: a block of tokens at a time, moments first, then what needs the whole vocabulary, then gradients.

The gradient is taken in the same pass as the value: once a block's logits are there, dHidden and dWeight cost two more
matrix products (four in all), instead of recomputing the logits in a backward (six).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsdl.losses import engines, moments, values
from opsdl.losses.call import Call, Gradients
from opsdl.losses.engine import Engine, MixingEngine
from opsdl.losses.shards import Shards


class Result(NamedTuple):
    """What a call gives."""

    values_N: Tensor
    stats_SN: Tensor  # in the order of Call.statistics
    gradients: Gradients  # of sum(values * scale), in Call.grad_dtypes


def run(call: Call) -> Result:
    """Compute the values of all tokens, and the wanted gradients of sum(values * scale).

    Tokens of scale 0 (masked) are left out of every product, so they may hold anything; their values are 0.
    """
    active_n = call.scale_N.nonzero().squeeze(1)
    engine = engines.make(call, len(active_n))
    values_N = torch.zeros_like(call.scale_N)
    stats_SN = values_N.new_zeros(len(call.statistics), len(values_N))
    for index_n in _blocks(active_n, engine):
        value_n, stats = _block(call, engine, index_n)
        values_N[index_n] = value_n
        for place, name in enumerate(call.statistics):
            if name in stats:
                stats_SN[place, index_n] = stats[name]
    return Result(values_N, stats_SN, _finished(call, engine.gradients()))


def _blocks(index_n: Tensor, engine: Engine) -> tuple[Tensor, ...]:
    """Cut into blocks of nearly equal size, none larger than the engine's, in whole panels of its own."""
    if not len(index_n):
        return ()
    count = -(-len(index_n) // engine.block)
    return index_n.split(-(-len(index_n) // (count * engine.panel)) * engine.panel)


def _block(call: Call, engine: Engine, index_n: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the values and statistics of one block; its gradients go to the engine's sums."""
    stats, picked_3n = _statistics(engine, index_n, call.shards)
    value_n, factors = values.finish(call.value, call.clip, stats, picked_3n, _divergence(call, engine, stats))
    if any(call.wanted):
        engine.prepare(stats, factors.scaled(call.scale_N[index_n]))
        kept_sn = None
        if call.skip_tolerance > 0:
            kept_sn = _keep(engine.energy(), call.skip_tolerance, call.shards)
            stats["skipped"] = 1 - call.shards.mean(kept_sn.to(value_n.dtype).mean(0))
        engine.accumulate(kept_sn)
    return value_n, stats


def _statistics(engine: Engine, index_n: Tensor, shards: Shards) -> tuple[dict[str, Tensor], Tensor]:
    """Return statistics of the whole vocabulary, and what was picked from it; the moments of its parts end here."""
    parts_7kn, picked_3n = engine.moments(index_n)
    whole_7n = moments.merge(shards.gather(moments.merge(parts_7kn)))
    return moments.statistics(whole_7n), shards.sum(picked_3n)


def _divergence(call: Call, engine: Engine, stats: dict[str, Tensor]) -> Tensor | None:
    if call.beta == 1:
        return None
    assert isinstance(engine, MixingEngine), f"backend {call.backend!r} has no divergence of beta {call.beta}"
    return engine.mix(call.beta, stats)


def _finished(call: Call, gradients: Gradients) -> Gradients:
    """Add up dHidden over the ranks; bring every gradient into the dtype in which it waits for the backward."""
    hidden_dtype, weight_dtype, bias_dtype = call.grad_dtypes
    return Gradients(
        None if gradients.hidden is None else call.shards.sum(gradients.hidden).to(hidden_dtype),
        None if gradients.weight is None else _narrow(gradients.weight, weight_dtype),
        None if gradients.bias is None else gradients.bias.to(bias_dtype),
    )


def _narrow(wide_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype`, into the front of the same memory where that is half as wide: a head's gradient is large."""
    if dtype.itemsize * 2 != wide_VH.dtype.itemsize:
        return wide_VH.to(dtype)
    wide = wide_VH.view(-1)
    narrow = wide.view(dtype)[: len(wide)]
    narrow[:1] = wide[:1].clone()
    start = 1
    while start < len(wide):  # numbers start to 2 start move into memory that ends where they begin
        narrow[start : 2 * start] = wide[start : 2 * start]
        start *= 2
    return narrow.view(wide_VH.shape)


def _keep(energy_sn: Tensor, tolerance: float, shards: Shards) -> Tensor:
    """Return [s, n] bool: False for parts of tokens that together hold at most tolerance^2 of the squared norm.

    The threshold comes from a histogram over the leading bits of the energies: within 1/16 of the best there is, in one
    pass.
    """
    energy_sn = energy_sn.float().nan_to_num().clamp(min=0.0)
    bin_sn = energy_sn.contiguous().view(torch.int32) >> 19  # the exponent and 4 bits
    histogram = shards.sum(torch.bincount(bin_sn.flatten(), energy_sn.flatten().double(), minlength=1 << 12))
    below = histogram.cumsum(0) <= tolerance**2 * histogram.sum()
    return ~below[bin_sn.long()]
