"""Small PTX programs for the tests of the emulator: one value a thread in, one value a thread out."""

from __future__ import annotations

import numpy as np
import torch

from tools import ptxsim

RNG = np.random.default_rng(0)
THREADS = 64
EDGE_FLOATS = np.array([0.0, -0.0, 1.5, -2.5, 1e-40, 3e38, np.inf, -np.inf, np.nan], np.float32)


def program(body, registers="", params=("a", "b", "c", "out"), shared=0):
    """A kernel of pointers; %offset is 8 * thread, so that each thread owns 8 bytes of every buffer."""
    declarations = ", ".join(f".param .u64 {name}" for name in params)
    loads = "".join(f"ld.param.u64 %{p}, [{p}]; add.s64 %{p}, %{p}, %offset;\n" for p in params)
    return f"""
.version 8.0
.target sm_90
.address_size 64
.shared .align 16 .b8 smem[{max(shared, 16)}];
.visible .entry kernel({declarations})
{{
    .reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .f32 %f<64>; .reg .b64 %d<16>;
    .reg .b64 %offset, {", ".join("%" + p for p in params)};
    {registers}
    mov.u32 %r63, %tid.x;
    mul.wide.u32 %offset, %r63, 8;
    {loads}
    {body}
    ret;
}}
"""


def as_slots(values):
    """One value of any type per 8-byte slot."""
    slots = np.zeros((len(values), 8), np.uint8)
    raw = np.ascontiguousarray(values)
    slots[:, : raw.itemsize] = raw.view(np.uint8).reshape(len(values), -1)
    return slots


def execute(body, *inputs, dtype, threads=THREADS, **options):
    buffers = [as_slots(i) for i in inputs] + [np.zeros((threads, 8), np.uint8)] * (3 - len(inputs))
    out = np.zeros((threads, 8), np.uint8)
    ptxsim.run_ptx(program(body, **options), (1,), threads, [*buffers, out])
    return out[:, : np.dtype(dtype).itemsize].copy().view(dtype)[:, 0]


def apply(instruction, kind, *inputs, result=None):
    """out = instruction(*inputs), operands of PTX type kind."""
    result = result or kind
    prefix = {"f32": "%f", "f16": "%h", "b16": "%h", "u16": "%h", "s16": "%h"}
    bank, out_bank = (prefix.get(k, "%d" if k[1:] == "64" else "%r") for k in (kind, result))
    memory, out_memory = (f"b{DTYPE[k].itemsize * 8}" for k in (kind, result))
    names = "abc"[: len(inputs)]
    body = "".join(f"ld.global.{memory} {bank}{i + 1}, [%{name}];\n" for i, name in enumerate(names))
    sources = ", ".join(f"{bank}{i + 1}" for i in range(len(inputs)))
    body += f"{instruction} {out_bank}9, {sources};\nst.global.{out_memory} [%out], {out_bank}9;"
    return execute(body, *inputs, dtype=DTYPE[result])


DTYPE = {
    **{"u16": np.dtype("u2"), "s16": np.dtype("i2"), "u32": np.dtype("u4"), "s32": np.dtype("i4")},
    **{"u64": np.dtype("u8"), "s64": np.dtype("i8"), "f32": np.dtype("f4"), "f16": np.dtype("f2")},
    **{"b16": np.dtype("u2"), "b32": np.dtype("u4"), "b64": np.dtype("u8")},
}


def integers(kind, low=None, high=None):
    limits = np.iinfo(DTYPE[kind])
    low, high = limits.min if low is None else low, limits.max if high is None else high
    return RNG.integers(low, high, THREADS, DTYPE[kind], endpoint=True)


def floats(scale=1.0):
    values = (RNG.standard_normal(THREADS) * scale).astype(np.float32)
    values[: len(EDGE_FLOATS)] = EDGE_FLOATS
    return values


def as_bf16(values):
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bf16(bits):
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
