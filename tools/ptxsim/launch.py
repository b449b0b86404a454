"""Run a kernel on torch CPU tensors or numpy arrays, in place.

run_ptx     any PTX text, e.g. what compile_cuda (nvcc -ptx) returns
run_triton  a @triton.jit function: compiled for a real GPU architecture, then executed here
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from .machine import Machine, RunReport
from .parser import Kernel, Module
from .tensor_map import TensorMap

_SWIZZLE_BYTES = {0: 16, 1: 32, 2: 64, 3: 128}


def is_tensor(value):
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


def host_bytes(tensor):
    """The memory behind a tensor, as a flat uint8 array that shares it. A strided torch tensor is fine."""
    if isinstance(tensor, np.ndarray):
        if not tensor.flags.c_contiguous:
            raise ValueError("numpy arguments must be contiguous")
        return tensor.reshape(-1).view(np.uint8)
    import torch

    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,))
    return flat.view(torch.uint8).numpy()


def _scalar(value):
    return value.item() if isinstance(value, np.generic) else value


def compile_cuda(source, arch="sm_90", flags=()):
    """PTX of a .cu file (a path) or of CUDA C++ source text (a string with a newline)."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if nvcc is None:
        raise FileNotFoundError("nvcc is neither on PATH nor in $CUDA_HOME/bin")
    with tempfile.TemporaryDirectory() as folder:
        if "\n" in str(source):
            path = Path(folder, "source.cu")
            path.write_text(source)
        else:
            path = Path(source)
        output = Path(folder, "kernel.ptx")
        command = [nvcc, "-std=c++17", "-O3", "-ptx", f"-arch={arch}", "-o", str(output), str(path), *flags]
        subprocess.run(command, check=True)
        return output.read_text()


def run_ptx(ptx, grid, block, args, entry=None, dynamic_shared=0, *, names=(), count_traffic=False) -> RunReport:
    """Run one entry of a PTX text. entry: its name or a part of it; args: tensors, ints, floats, in order."""
    machine = Machine(count_traffic)
    kernel = Kernel(Module(ptx), entry)
    names = tuple(names) or tuple(p.name for p in kernel.params)
    params = [
        machine.register(host_bytes(value), name) if is_tensor(value) else _scalar(value)
        for name, value in zip(names, args, strict=True)
    ]
    return machine.launch(kernel, grid, params, block, dynamic_shared)


def run_triton(
    kernel,
    grid,
    args,
    constexprs=None,
    arch=90,
    num_warps=4,
    num_stages=3,
    *,
    options=None,
    divisible_by_16=(),
    count_traffic=False,
    edit_ptx=None,
) -> RunReport:
    """Compile a Triton kernel for sm_<arch> and run it on args in place.

    kernel           a @triton.jit function; of an autotuned one, give the constexprs of one configuration
    grid             tuple, or function of the constexprs
    args             {name: value} or values in order, without the constexprs: torch CPU tensors, numpy
                     arrays, ints, floats, triton.tools.tensor_descriptor.TensorDescriptor
    constexprs       {name: value}
    options          further compiler options, e.g. {"maxnreg": 128}
    divisible_by_16  int arguments to specialise as the JIT does for multiples of 16; tensors at 16-byte
                     aligned addresses always are
    count_traffic    also count memory sectors and bank conflicts: report.traffic
    edit_ptx         function applied to the PTX before it runs (mutation tests)
    """
    from .. import triton_aot  # it imports Triton, which PTX by hand does without

    constexprs = constexprs or {}
    args = triton_aot.name_arguments(kernel, args, constexprs)
    compiled = triton_aot.compile(
        kernel,
        {name: triton_aot.argument_type(value) for name, value in args.items()},
        constexprs,
        arch,
        {"num_warps": num_warps, "num_stages": num_stages, **(options or {})},
        aligned=[name for name, value in args.items() if is_tensor(value) and _address(value) % 16 == 0],
        divisible_by_16=divisible_by_16,
    )
    grid = tuple(grid(constexprs) if callable(grid) else grid)
    ptx = edit_ptx(compiled.ptx) if edit_ptx else compiled.ptx
    program = Kernel(Module(ptx))
    machine = Machine(count_traffic)
    params = _triton_params(machine, args, compiled.metadata)
    params += _scratch_params(machine, len(program.params) - len(params), compiled.metadata, grid)
    threads = program.threads or compiled.num_warps * 32
    return machine.launch(program, grid, params, threads, compiled.shared_bytes)


def _address(tensor):
    return tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr()


def _triton_params(machine, args, metadata):
    from .. import triton_aot

    params = []
    tensor_maps = iter(getattr(metadata, "tensordesc_meta", None) or [])
    for name, value in args.items():
        if is_tensor(value):
            params.append(machine.register(host_bytes(value), name))
        elif triton_aot.is_descriptor(value):
            params += _descriptor_params(machine, name, value, next(tensor_maps, None))
        else:
            params.append(_scalar(value))
    return params


def _descriptor_params(machine, name, descriptor, layout):
    """A host TensorDescriptor becomes a TMA map where the GPU has TMA, a pointer and its bounds elsewhere."""
    if descriptor.padding != "zero":
        raise NotImplementedError("only zero padding is modelled")
    base = machine.register(host_bytes(descriptor.base), name)
    bounds = [*descriptor.shape, *descriptor.strides]
    if layout is None:
        pad_with_nan = round_to_tf32 = 0
        return [base, *bounds, pad_with_nan, round_to_tf32, *bounds]
    item_size = layout["elem_size"]
    tensor_map = TensorMap(
        base=base,
        dims=list(descriptor.shape)[::-1],
        strides=[stride * item_size for stride in list(descriptor.strides)[-2::-1]],
        box=list(layout["block_size"])[::-1],
        item_size=item_size,
        swizzle=_SWIZZLE_BYTES[layout["swizzle"]],
    )
    return [machine.register_tensor_map(tensor_map), *bounds]


def _scratch_params(machine, count, metadata, grid):
    """Triton appends pointers to scratch memory (for tensor maps made in the kernel) and profiler memory."""
    size = metadata.global_scratch_size * int(np.prod(grid))
    scratch = machine.register(np.zeros(size, np.uint8), "scratch") if size else 0
    return [scratch, *[0] * (count - 1)]
