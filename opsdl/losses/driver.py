"""The order of work: a block of tokens at a time, moments first, then what needs the whole vocabulary, then gradients.

The gradient is taken in the same pass as the value: once a block's logits are there, dHidden and dWeight cost two more
matrix products (four in all), instead of recomputing the logits in a backward (six).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsdl.losses import moments, values
from opsdl.losses.call import Problem
from opsdl.losses.engines.cpu import CpuEngine
from opsdl.losses.engines.torch import TorchEngine
from opsdl.losses.engines.triton import TritonEngine
from opsdl.losses.shards import Shards

Engine = TorchEngine | CpuEngine | TritonEngine
ENGINES = {"torch": TorchEngine, "cpu": CpuEngine, "triton": TritonEngine}


class Result(NamedTuple):
    values_N: Tensor
    stats_SN: Tensor  # rows as in values.names
    grad_hidden: Tensor | None  # [N, H]; dtypes as in Problem.grad_dtypes
    grad_weight: Tensor | None  # [V, H]
    grad_bias: Tensor | None  # [V]


def run(problem: Problem, scale_N: Tensor, wanted: tuple[bool, bool, bool], backend: str) -> Result:
    """Values of all tokens, and the wanted gradients of sum(values * scale) for hidden, weight and bias.

    Tokens of scale 0 (masked) are left out of every product, so they may hold anything; their values are 0.
    """
    active_n = scale_N.nonzero().squeeze(1)
    engine = ENGINES[backend](problem, wanted, len(active_n))
    names = values.names(problem.kind, problem.tokens_N is not None, problem.skip_tolerance > 0)
    values_N, stats_SN = torch.zeros_like(scale_N), scale_N.new_zeros(len(names), len(scale_N))
    for tokens_n in _blocks(active_n, engine):
        stats, picked_3n = _statistics(engine, tokens_n, problem.shards)
        divergence_n = None if problem.beta == 1 else engine.mix(problem.beta, stats)
        value_n, factors = values.finish(problem.kind, problem.clip, stats, picked_3n, divergence_n)
        if any(wanted):
            engine.prepare(stats, factors.scaled(scale_N[tokens_n]))
            kept_kn = None
            if problem.skip_tolerance > 0:
                kept_kn = _keep(engine.energy(), problem.skip_tolerance, problem.shards)
                stats["skipped"] = 1 - problem.shards.mean(kept_kn.to(value_n.dtype).mean(0))
            engine.accumulate(kept_kn)
        values_N[tokens_n] = value_n
        for row, name in enumerate(names):
            if name in stats:
                stats_SN[row, tokens_n] = stats[name]
    grad_hidden, grad_weight, grad_bias = engine.gradients()
    hidden_dtype, weight_dtype, bias_dtype = problem.grad_dtypes
    if wanted[0]:
        grad_hidden = problem.shards.sum(grad_hidden).to(hidden_dtype)
    if wanted[1]:
        grad_weight = _narrow(grad_weight, weight_dtype)
    if wanted[2]:
        grad_bias = grad_bias.to(bias_dtype)
    return Result(values_N, stats_SN, grad_hidden, grad_weight, grad_bias)


def _blocks(tokens_n: Tensor, engine: Engine) -> tuple[Tensor, ...]:
    """Blocks of nearly equal size, none larger than the engine's, in whole panels of its own."""
    if not len(tokens_n):
        return ()
    count = -(-len(tokens_n) // engine.block)
    return tokens_n.split(-(-len(tokens_n) // (count * engine.panel)) * engine.panel)


def _statistics(engine: Engine, tokens_n: Tensor, shards: Shards) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics of the whole vocabulary, and what was picked from it; the moments of its parts end here."""
    parts_7Kn, picked_3n = engine.moments(tokens_n)
    whole_7n = moments.merge(shards.gather(moments.merge(parts_7Kn)))
    return moments.statistics(whole_7n), shards.sum(picked_3n)


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


def _keep(energy_kn: Tensor, tolerance: float, shards: Shards) -> Tensor:
    """[K, n] bool: False for parts of tokens that together hold at most tolerance^2 of the gradient's squared norm.

    A threshold from a histogram over the leading bits of the energies: within 1/16 of the best there is, in one pass.
    """
    energy_kn = energy_kn.float().nan_to_num().clamp(min=0.0)
    bin_kn = energy_kn.contiguous().view(torch.int32) >> 19  # the exponent and 4 bits
    histogram = shards.sum(torch.bincount(bin_kn.flatten(), energy_kn.flatten().double(), minlength=1 << 12))
    below = histogram.cumsum(0) <= tolerance**2 * histogram.sum()
    return ~below[bin_kn.long()]
