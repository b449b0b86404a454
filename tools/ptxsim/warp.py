"""Warp-wide exchange and votes, block barriers, and control flow.

Not modelled: the memory ordering of fences (they do nothing), bar.arrive, bar.red, clusters of more than one
block. A barrier among some of the warps starts a new interval for the race check of the whole block.
"""

import re

import numpy as np

from .block import NOT_WAITING, first_modifier
from .dtypes import DTYPES, U32, PtxError, unsupported
from .registry import instruction


@instruction("shfl")
def _shfl(block, ins):
    destinations = ins.operands[0].split("|")
    read_value, read_lane, read_bounds = (
        block.source(operand, t) for operand, t in zip(ins.operands[1:4], ("b32", "u32", "u32"), strict=True)
    )
    mode = first_modifier(ins, ("bfly", "idx", "up", "down"))
    lane = block.lane & 31
    warp_start = block.lane & ~31

    def run(mask):
        value = read_value()
        argument, bounds = read_lane().astype(np.int64), read_bounds().astype(np.int64)
        segment, clamp = bounds >> 8 & 31, bounds & 31
        highest, lowest = (lane & segment) | (clamp & ~segment), lane & segment
        if mode == "bfly":
            source = lane ^ argument
        elif mode == "idx":
            source = lowest | (argument & ~segment & 31)
        else:
            source = lane - argument if mode == "up" else lane + argument
        in_range = source >= highest if mode == "up" else source <= highest
        source = np.where(in_range, source, lane) + warp_start
        if mask is not None and not mask[source[mask]].all():
            raise PtxError("shfl reads an inactive lane: " + ins.text)
        block.write(destinations[0], value[source], mask)
        if len(destinations) > 1:
            block.write(destinations[1], in_range, mask)

    return run


def _per_warp(block, dtype, warps, values):
    """One value per warp, given to all its lanes."""
    result = np.zeros(block.num_threads, dtype)
    result[warps] = values[:, None]
    return result


@instruction("vote")
def _vote(block, ins):
    read = block.source(ins.operands[1], "pred")
    mode = first_modifier(ins, ("ballot", "any", "all", "uni"))
    reduce = {
        "ballot": lambda p: (p.astype(np.int64) << np.arange(32)).sum(1).astype(U32),
        "any": lambda p: p.any(1),
        "all": lambda p: p.all(1),
        "uni": lambda p: p.all(1) | ~p.any(1),
    }[mode]

    def run(mask):
        warps = block.active_warps(mask)
        votes = reduce(read()[warps])
        block.write(ins.operands[0], _per_warp(block, votes.dtype, warps, votes), mask)

    return run


@instruction("redux")
def _redux(block, ins):
    read = block.source(ins.operands[1], ins.type)
    reduce = {
        "add": lambda x: x.sum(1, dtype=x.dtype),
        "min": lambda x: x.min(1),
        "max": lambda x: x.max(1),
        "and": lambda x: np.bitwise_and.reduce(x, 1),
        "or": lambda x: np.bitwise_or.reduce(x, 1),
        "xor": lambda x: np.bitwise_xor.reduce(x, 1),
    }[ins.op[2]]
    if len(ins.op) != 4:
        raise unsupported(ins)  # .abs, .NaN

    def run(mask):
        warps = block.active_warps(mask)
        values = reduce(read()[warps])
        block.write(ins.operands[0], _per_warp(block, DTYPES[ins.type], warps, values), mask)

    return run


@instruction("elect")
def _elect(block, ins):
    _, predicate = ins.operands[0].split("|")

    def run(mask):
        elected = np.zeros(block.num_threads, bool)
        elected[block.active_warps(mask)[:, 0]] = True
        block.write(predicate, elected, mask)

    return run


@instruction("activemask")
def _activemask(block, ins):
    def run(mask):
        active = np.zeros(block.num_threads, bool)
        active[block.active(mask)] = True
        padded = np.zeros(-(-block.num_threads // 32) * 32, np.int64)
        padded[: block.num_threads] = active
        bits = (padded.reshape(-1, 32) << np.arange(32)).sum(1).astype(U32)
        block.write(ins.operands[0], bits[block.lane >> 5], mask)

    return run


@instruction("bar", "barrier")
def _barrier(block, ins):
    if ins.has("warp") or (ins.has("cluster") and ins.has("arrive")):
        return lambda mask: None
    operands = [] if ins.has("cluster") else ins.operands
    if ins.has("arrive") or ins.has("red") or not all(re.match(r"\d", o) for o in operands):
        raise unsupported(ins)
    number = int(operands[0], 0) if operands else 0
    expected = int(operands[1], 0) if len(operands) > 1 else block.num_threads

    def run(mask):
        block.waiting[block.active(mask)] = number
        arrived = (block.waiting == number) & ~block.done
        if expected == block.num_threads and block.done.any():
            raise PtxError("bar.sync after some threads returned")
        if arrived.sum() >= expected:
            block.waiting[arrived] = NOT_WAITING
            block.shared.epoch += 1
            block.progress()

    return run


@instruction("ret", "exit")
def _return(block, ins):
    def run(mask):
        block.done[block.active(mask)] = True

    return run


@instruction("bra")
def _branch(block, ins):
    def run(mask):
        block.pc[block.active(mask)] = ins.target

    return run


@instruction(*("fence", "membar", "nanosleep", "griddepcontrol", "setmaxnreg", "prefetch", "discard", "applypriority"))
def _no_effect(block, ins):
    return lambda mask: None


@instruction("trap")
def _trap(block, ins):
    def run(mask):
        raise PtxError("trap")

    return run
