"""Logic, shifts, bit fields and permutations of bytes."""

import numpy as np

from .block import elementwise
from .dtypes import DTYPES, U8, U32, U64, unsupported
from .registry import instruction

_BITWISE = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
}


@instruction(*_BITWISE)
def _bitwise(block, ins):
    return elementwise(block, ins.operands, ins.type, _BITWISE[ins.op[0]])


@instruction("shl", "shr")
def _shift(block, ins):
    bits = DTYPES[ins.type].itemsize * 8
    signed = ins.type[0] == "s"

    def left(a, n):
        return np.where(n >= bits, 0, a << (n % bits).astype(a.dtype))

    def right(a, n):
        overflow = a >> a.dtype.type(bits - 1) if signed else a.dtype.type(0)
        return np.where(n >= bits, overflow, a >> (n % bits).astype(a.dtype))

    function = left if ins.op[0] == "shl" else right
    return elementwise(block, ins.operands, [ins.type, "u32"], function, ins.type)


@instruction("shf")
def _funnel_shift(block, ins):
    def shift(low, high, n):
        value = (high.astype(U64) << U64(32)) | low.astype(U64)
        n = ((n & U32(31)) if ins.has("wrap") else np.minimum(n, 32)).astype(U64)
        return ((value >> n) if ins.has("r") else ((value << n) >> U64(32))).astype(U32)

    return elementwise(block, ins.operands, "u32", shift)


@instruction("bfe")
def _bit_field_extract(block, ins):
    if DTYPES[ins.type].itemsize != 4:
        raise unsupported(ins)
    signed = ins.type[0] == "s"

    def extract(a, position, length):
        position, length = position & 255, length & 255
        ones = (1 << np.minimum(length, 32).astype(np.int64)) - 1
        mask = np.where(length >= 32, 0xFFFFFFFF, ones)
        field = (a.astype(np.int64) & 0xFFFFFFFF) >> np.minimum(position, 63) & mask
        if signed:
            sign = 1 << np.maximum(length.astype(np.int64) - 1, 0)
            field = np.where((field & sign) != 0, field - 2 * sign, field)
        return field

    return elementwise(block, ins.operands, [ins.type, "u32", "u32"], extract, ins.type)


@instruction("bfi")
def _bit_field_insert(block, ins):
    if DTYPES[ins.type].itemsize != 4:
        raise unsupported(ins)

    def insert(field, base, position, length):
        mask = ((1 << length.astype(np.int64)) - 1) << position
        return (base.astype(np.int64) & ~mask) | ((field.astype(np.int64) << position) & mask)

    return elementwise(block, ins.operands, ["u32"] * 4, insert, "u32")


@instruction("prmt")
def _permute_bytes(block, ins):
    if len(ins.op) != 2:
        raise unsupported(ins)  # the .f4e, .b4e, .rc8 ... modes

    def permute(a, b, selector):
        source = np.stack([a, b], 1).astype(U32).view(U8).reshape(block.num_threads, 8)
        out = np.empty((block.num_threads, 4), U8)
        for i in range(4):
            choice = (selector >> U32(4 * i)) & U32(15)
            byte = source[block.lane, choice & U32(7)]
            replicated_sign = np.where(byte & 128, 255, 0)
            out[:, i] = np.where(choice & U32(8), replicated_sign, byte)
        return out.view(U32).reshape(block.num_threads)

    return elementwise(block, ins.operands, "u32", permute)


@instruction("lop3")
def _three_input_logic(block, ins):
    if len(ins.op) != 2:
        raise unsupported(ins)
    table = int(ins.operands[4], 0)

    def logic(a, b, c):
        result = np.zeros_like(a)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    return elementwise(block, ins.operands[:4], "u32", logic)


@instruction("popc")
def _popc(block, ins):
    return elementwise(block, ins.operands, ins.type, lambda a: [int(x).bit_count() for x in a], "u32")
