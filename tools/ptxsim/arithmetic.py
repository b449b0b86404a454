"""Arithmetic on integers and floating-point numbers.

Not modelled: flush-to-zero, directed rounding (everything rounds to nearest), the last-bit errors of the .approx
functions (numpy's are used), .sat (rejected), carries (addc and subc are rejected).
"""

import functools

import numpy as np

from .block import elementwise
from .dtypes import DTYPES, U16, U32, U64, f32_to_bf16, half_to_f32, unsupported
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


@instruction(*_ARITHMETIC)
def _simple_arithmetic(block, ins):
    return arithmetic(block, ins, _ARITHMETIC[ins.op[0]])


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
