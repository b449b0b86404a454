"""Arithmetic, logic, comparison, selection, conversion and mov.

Not modelled: flush-to-zero, directed rounding of arithmetic (everything rounds to nearest), the last-bit
errors of the .approx functions (numpy's are used), .sat on arithmetic (rejected), carries (addc/subc are
rejected).
"""

import functools

import numpy as np

from .block import elementwise
from .dtypes import (
    DTYPES,
    U8,
    U16,
    U32,
    U64,
    UNSIGNED_OF_SIZE,
    PtxError,
    bf16_to_f32,
    f32_to_bf16,
    f32_to_tf32,
    half_to_f32,
    unsupported,
)
from .memory import SHARED_WINDOW
from .parser import operand_list
from .registry import instruction

_NOT_MODELLED = ("sat", "relu", "xorsign", "satfinite")
_WIDER = {"s32": "s64", "u32": "u64", "s16": "s32", "u16": "u32", "b32": "u64"}


def _through_f32(block, ins, function):
    """bf16, bf16x2 and f16x2: compute in fp32, round once."""
    ptx_type = "f16" if ins.type.startswith("f16") else "bf16"
    packed = ins.type.endswith("x2")

    def unpack(bits):
        halves = np.ascontiguousarray(bits).view(U16).reshape(block.num_threads, -1)
        return half_to_f32(halves, ptx_type)

    def compute(*sources):
        result = function(*[unpack(source) for source in sources])
        halves = result.astype(np.float16).view(U16) if ptx_type == "f16" else f32_to_bf16(result)
        return np.ascontiguousarray(halves).view(U32 if packed else U16).reshape(block.num_threads)

    return elementwise(block, ins.operands, "b32" if packed else "b16", compute)


def arithmetic(block, ins, function):
    if any(ins.has(modifier) for modifier in _NOT_MODELLED):
        raise unsupported(ins)
    if ins.type in ("bf16", "bf16x2", "f16x2"):
        return _through_f32(block, ins, function)
    if ins.type == "f32x2":

        def two_floats(*sources):
            result = function(*[np.ascontiguousarray(s).view(np.float32) for s in sources])
            return np.ascontiguousarray(result.astype(np.float32)).view(U64)

        return elementwise(block, ins.operands, "b64", two_floats)
    if ins.type == "f16":

        def one_half(*sources):
            return function(*[s.astype(np.float32) for s in sources]).astype(np.float16)

        return elementwise(block, ins.operands, "f16", one_half)
    return elementwise(block, ins.operands, ins.type, function)


_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "abs": np.abs,
    "neg": lambda a: -a,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rcp": lambda a: np.float32(1) / a,
    "rsqrt": lambda a: np.float32(1) / np.sqrt(a),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}
_BITWISE = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
}


@instruction(*_ARITHMETIC)
def _simple_arithmetic(block, ins):
    return arithmetic(block, ins, _ARITHMETIC[ins.op[0]])


@instruction(*_BITWISE)
def _bitwise(block, ins):
    return elementwise(block, ins.operands, ins.type, _BITWISE[ins.op[0]])


@instruction("mul", "mul24")
def _mul(block, ins):
    if ins.has("wide"):
        wide = _WIDER[ins.type]
        dtype = DTYPES[wide]
        return elementwise(block, ins.operands, ins.type, lambda a, b: a.astype(dtype) * b.astype(dtype), wide)
    if ins.has("hi"):
        dtype = {"s32": np.dtype(np.int64), "u32": np.dtype(np.uint64)}[ins.type]

        def high_half(a, b):
            return ((a.astype(dtype) * b.astype(dtype)) >> dtype.type(32)).astype(DTYPES[ins.type])

        return elementwise(block, ins.operands, ins.type, high_half)
    return arithmetic(block, ins, lambda a, b: a * b)


@instruction("mad")
def _mad(block, ins):
    if ins.type[0] == "f":
        return _fma(block, ins)
    if ins.has("wide"):
        wide = _WIDER[ins.type]
        dtype = DTYPES[wide]
        types = [ins.type, ins.type, wide]
        return elementwise(block, ins.operands, types, lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c, wide)
    if ins.has("hi") or ins.has("sat"):
        raise unsupported(ins)
    return elementwise(block, ins.operands, ins.type, lambda a, b, c: a * b + c)


@instruction("fma")
def _fma(block, ins):
    if ins.type == "f32" and not ins.has("sat"):

        def fused(a, b, c):  # the product is exact in fp64, so this rounds (almost always) once
            return (a.astype(np.float64) * b + c).astype(np.float32)

        return elementwise(block, ins.operands, "f32", fused)
    return arithmetic(block, ins, lambda a, b, c: a * b + c)


@instruction("div")
def _div(block, ins):
    if ins.type[0] == "f":
        return arithmetic(block, ins, lambda a, b: a / b)
    signed = ins.type[0] == "s"

    def truncating(a, b):
        b = np.where(b == 0, 1, b)
        if not signed:
            return a // b
        quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
        return np.where((a < 0) ^ (b < 0), -quotient, quotient)

    return elementwise(block, ins.operands, ins.type, truncating)


@instruction("rem")
def _rem(block, ins):
    return elementwise(block, ins.operands, ins.type, lambda a, b: np.fmod(a, np.where(b == 0, 1, b)))


@instruction("min", "max")
def _min_max(block, ins):
    minimum = ins.op[0] == "min"
    is_float = ins.type[0] in "fb"
    if is_float and not ins.has("NaN"):
        function = np.fmin if minimum else np.fmax  # a NaN operand is ignored
    else:
        function = np.minimum if minimum else np.maximum
    # sm_100 added a form with three sources.
    return arithmetic(block, ins, lambda first, *rest: functools.reduce(function, rest, first))


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


@instruction("trap")
def _trap(block, ins):
    def run(mask):
        raise PtxError("trap")

    return run
