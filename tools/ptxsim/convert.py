"""Conversion between types and state spaces, and mov with its packing and unpacking."""

import numpy as np

from .block import elementwise
from .dtypes import DTYPES, U16, U32, U64, UNSIGNED_OF_SIZE, bf16_to_f32, f32_to_bf16, f32_to_tf32, unsupported
from .memory import SHARED_WINDOW
from .parser import operand_list
from .registry import instruction

_ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(values, target, source, modifiers):
    if source == "bf16":
        values = bf16_to_f32(values)
    if target == "bf16":
        return f32_to_bf16(values.astype(np.float32))
    if target == "tf32":
        return f32_to_tf32(values)
    for modifier in modifiers:
        if modifier in _ROUND_TO_INTEGER:
            values = _ROUND_TO_INTEGER[modifier](values)
    dtype = DTYPES[target]
    if dtype.kind in "iu" and values.dtype.kind == "f":  # saturates, and NaN becomes 0
        limits = np.iinfo(dtype)
        clipped = np.clip(values.astype(np.float64), limits.min, limits.max)
        return np.where(np.isnan(values), 0, clipped).astype(dtype)
    result = values.astype(dtype)
    return np.clip(result, 0, 1) if "sat" in modifiers and dtype.kind == "f" else result


@instruction("cvt")
def _cvt(block, ins):
    target, source = ins.op[-2:]
    modifiers = ins.op[1:-2]
    if "relu" in modifiers or "satfinite" in modifiers:
        raise unsupported(ins)
    if target in ("bf16x2", "f16x2"):
        read_high, read_low = block.source(ins.operands[1], "f32"), block.source(ins.operands[2], "f32")

        def half(values):
            return f32_to_bf16(values) if target == "bf16x2" else values.astype(np.float16).view(U16)

        def pack(mask):
            halves = np.stack([half(read_low()), half(read_high())], 1)
            block.write(ins.operands[0], halves.view(U32).reshape(block.num_threads), mask)

        return pack
    DTYPES[target]  # KeyError here, not in the middle of a run
    if "sat" in modifiers and DTYPES[target].kind != "f":
        raise unsupported(ins)
    read = block.source(ins.operands[1], source)

    def run(mask):
        result = _convert(read(), target, source, modifiers)
        if target in ("s8", "s16"):
            result = result.astype(np.int64)  # the register may be wider: sign-extend
        block.write(ins.operands[0], result, mask)

    return run


@instruction("cvta")
def _convert_address(block, ins):
    offset = U64(SHARED_WINDOW if ins.has("shared") or ins.has("shared::cta") else 0)
    read = block.source(ins.operands[1], "u64")
    if ins.has("to"):
        return lambda mask: block.write(ins.operands[0], read() - offset, mask)
    return lambda mask: block.write(ins.operands[0], read() + offset, mask)


@instruction("mov")
def _mov(block, ins):
    target, source = ins.operands
    if target.startswith("{"):
        return _unpack(block, ins, operand_list(target), source)
    if source.startswith("{"):
        return _pack(block, ins, target, operand_list(source))
    return elementwise(block, ins.operands, ins.type, lambda a: a)


def _unpack(block, ins, targets, source):
    size = DTYPES[ins.type].itemsize
    read = block.source(source, f"b{size * 8}")
    part = UNSIGNED_OF_SIZE[size // len(targets)]

    def run(mask):
        parts = np.ascontiguousarray(read()).view(part).reshape(block.num_threads, len(targets))
        for i, target in enumerate(targets):
            block.write(target, parts[:, i].copy(), mask)

    return run


def _pack(block, ins, target, sources):
    size = DTYPES[ins.type].itemsize
    reads = [block.source(source, f"b{size // len(sources) * 8}") for source in sources]
    whole = UNSIGNED_OF_SIZE[size]

    def run(mask):
        parts = np.stack([read() for read in reads], 1)
        block.write(target, parts.view(whole).reshape(block.num_threads), mask)

    return run
