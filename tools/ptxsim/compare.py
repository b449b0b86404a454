"""Comparison and selection: setp and selp."""

import numpy as np

from .block import elementwise
from .dtypes import bf16_to_f32, unsupported
from .registry import instruction


@instruction("selp")
def _selp(block, ins):
    types = [ins.type, ins.type, "pred"]
    return elementwise(block, ins.operands, types, lambda a, b, p: np.where(p, a, b), ins.type)


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(comparison, a, b):
    """Without a trailing "u" a comparison with NaN is false, with it true."""
    if a.dtype.kind != "f":
        return _COMPARE[comparison](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if comparison == "num":
        return ~unordered
    if comparison == "nan":
        return unordered
    if comparison in _COMPARE:
        return _COMPARE[comparison](a, b) & ~unordered
    return _COMPARE[comparison[:-1]](a, b) | unordered


@instruction("setp")
def _setp(block, ins):
    comparison = ins.op[1]
    combine = _COMBINE.get(ins.op[2]) if len(ins.op) > 3 else None
    destinations = ins.operands[0].split("|")
    read_a, read_b = block.source(ins.operands[1], ins.type), block.source(ins.operands[2], ins.type)
    read_other = block.source(ins.operands[3], "pred") if combine else None
    if ins.type == "bf16x2" or ins.type == "f16x2":
        raise unsupported(ins)

    def run(mask):
        a, b = read_a(), read_b()
        if ins.type == "bf16":
            a, b = bf16_to_f32(a), bf16_to_f32(b)
        result = _compare(comparison, a, b)
        complement = ~result
        if combine:
            other = read_other()
            result, complement = combine(result, other), combine(complement, other)
        block.write(destinations[0], result, mask)
        if len(destinations) > 1:
            block.write(destinations[1], complement, mask)

    return run
