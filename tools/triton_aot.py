"""Compile Triton kernels for GPUs that are not there, and check what the compiler made of them.

    from tools import triton_aot
    built = triton_aot.compile(kernel, {"x": "*bf16", "n": "i32"}, {"BLOCK": 128}, 90, {"num_warps": 8})
    print(built.registers, built.spills, built.shared_bytes, built.opcodes["HGMMA"])
    triton_aot.assert_budget(built, max_registers=200, requires=["HGMMA", "UTMALDG"])

arch is an SM number (80, 90, 100, 120) or an AMD name ("gfx942": assembly text only). Works from the Triton
wheel alone: ptxas, cuobjdump and nvdisasm are inside it. TRITON_INTERPRET must not be set.

Not shown: speed, occupancy limits other than registers and shared memory, anything that happens at run time.
"""

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Unset, Triton 3.9 warns, and the default changes in 3.10.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.M)

SHARED_BYTES_LIMIT = {
    **{80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024},
    **{90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024},
}
TENSOR_CORE_OPCODE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
_REGISTERS_PER_SM = 65536

_TRITON_TYPES = {
    **{"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"},
    **{"int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "bool": "i1"},
    **{"uint64": "u64", "uint32": "u32", "uint16": "u16", "uint8": "u8"},
    **{"float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5"},
}


@dataclass
class Compiled:
    arch: int | str
    asm: Mapping = field(repr=False)  # every stage: "ttir", "ttgir", "llir", "ptx", "cubin" or "amdgcn", "hsaco"
    metadata: object = field(repr=False)

    @property
    def ptx(self):
        return self.asm["ptx"]

    @property
    def shared_bytes(self):
        return self.metadata.shared

    @property
    def num_warps(self):
        return self.metadata.num_warps

    @functools.cached_property
    def _cubin_report(self):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            commands = [["cuobjdump", "--dump-resource-usage", file.name], ["nvdisasm", "-c", file.name]]
            usage, sass = (
                subprocess.run([_TOOLS / c[0], *c[1:]], capture_output=True, text=True, check=True).stdout
                for c in commands
            )
        return {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}, sass

    @property
    def sass(self):
        return self._cubin_report[1]

    @property
    def registers(self):
        """Per thread."""
        return self._cubin_report[0]["REG"]

    @property
    def stack_bytes(self):
        return self._cubin_report[0]["STACK"] + self._cubin_report[0]["LOCAL"]

    @functools.cached_property
    def opcodes(self):
        """How often each SASS opcode occurs in the code, e.g. HMMA, HGMMA, UTCHMMA, LDGSTS, UTMALDG, LDSM."""
        return Counter(_SASS_LINE.findall(self.sass))

    @property
    def spills(self):
        """Local memory instructions: registers that did not fit."""
        return self.opcodes["STL"] + self.opcodes["LDL"]


def is_descriptor(value):
    return all(hasattr(value, name) for name in ("base", "shape", "strides", "block_shape"))


def argument_type(value):
    """The Triton signature entry for a run-time argument."""
    if is_descriptor(value):
        return f"tensordesc<{_dtype_name(value.base)}{list(value.block_shape)}>"
    if hasattr(value, "dtype") and hasattr(value, "shape") and (value.shape or hasattr(value, "data_ptr")):
        return "*" + _dtype_name(value)
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "item"):
        return argument_type(value.item())
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _dtype_name(tensor):
    return _TRITON_TYPES[str(tensor.dtype).removeprefix("torch.")]


def jit_function(kernel):
    """The @triton.jit function inside @triton.autotune / @triton.heuristics."""
    if type(kernel).__name__ == "InterpretedFunction":
        raise RuntimeError("TRITON_INTERPRET is set: this process can interpret kernels, not compile them")
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    return kernel


def with_default_constexprs(kernel, constexprs):
    defaults = {p.name: p.default for p in jit_function(kernel).params if p.is_constexpr and p.has_default}
    return {**defaults, **(constexprs or {})}


def name_arguments(kernel, args, constexprs):
    """{name: value} in the order of the kernel's parameters, from a dict or from values in that order."""
    constexprs = with_default_constexprs(kernel, constexprs)
    names = [name for name in jit_function(kernel).arg_names if name not in constexprs]
    values = dict(args) if isinstance(args, Mapping) else dict(zip(names, args, strict=False))
    if sorted(values) != sorted(names) or (not isinstance(args, Mapping) and len(args) != len(names)):
        raise TypeError(f"the kernel takes {names} besides its constexprs, got {list(values)}")
    return {name: values[name] for name in names}


def compile(kernel, signature, constexprs, arch, options=None, *, aligned=None, divisible_by_16=()):
    """Compile for one architecture; 1.5 to 4 s, cached in TRITON_CACHE_DIR.

    signature        {argument: type}: "*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>" ...
    constexprs       {argument: value}
    options          num_warps, num_stages, maxnreg ...
    aligned          pointers known to be 16-byte aligned; default all, as torch tensors are. Without it the
                     compiler emits no cp.async and no vector loads, and the numbers mean nothing.
    divisible_by_16  int arguments to specialise as the JIT does
    """
    function = jit_function(kernel)
    constexprs = with_default_constexprs(kernel, constexprs)
    types = {**dict.fromkeys(constexprs, "constexpr"), **signature}
    if aligned is None:
        aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name in (*aligned, *divisible_by_16)
    }
    source = ASTSource(
        fn=function,
        signature={name: types[name] for name in function.arg_names if name in types},
        constexprs=constexprs,
        attrs=attributes,
    )
    is_amd = isinstance(arch, str) and arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", arch, 32)
    built = triton.compile(source, target=target, options=dict(options or {}))
    return Compiled(arch, built.asm, built.metadata)


class BudgetError(AssertionError):
    pass


def assert_budget(
    built,
    *,
    max_registers=255,
    max_shared_bytes=None,
    max_spills=0,
    max_stack_bytes=0,
    requires=(),
    forbids=(),
):
    """Raise BudgetError that lists every limit exceeded; returns built.

    max_shared_bytes  default: what one block may use on this architecture
    requires          opcodes that must occur, or {opcode: least count}
    forbids           opcodes that must not occur
    """
    if max_shared_bytes is None:
        max_shared_bytes = SHARED_BYTES_LIMIT[built.arch]
    at_least = requires if isinstance(requires, Mapping) else dict.fromkeys(requires, 1)
    block_registers = built.registers * 32 * built.num_warps
    broken = [
        f"{what}: {value} > {limit}"
        for what, value, limit in (
            ("spill instructions", built.spills, max_spills),
            ("stack bytes per thread", built.stack_bytes, max_stack_bytes),
            ("registers per thread", built.registers, max_registers),
            ("registers per block", block_registers, _REGISTERS_PER_SM),
            ("shared memory bytes", built.shared_bytes, max_shared_bytes),
        )
        if value > limit
    ]
    broken += [f"{op}: {built.opcodes[op]} < {n}" for op, n in at_least.items() if built.opcodes[op] < n]
    broken += [f"{op}: {built.opcodes[op]}, forbidden" for op in forbids if built.opcodes[op]]
    if broken:
        raise BudgetError(f"sm_{built.arch}, {built.num_warps} warps: " + "; ".join(broken))
    return built
