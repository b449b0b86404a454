"""The compiled parts of the library, if they were built: operators in torch.ops.opsdl once loaded."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch


@cache
def load() -> str:
    """Load the operators for CPUs: "available", or why they cannot be used here."""
    capability = torch.backends.cpu.get_cpu_capability()
    if _library("_cpu").exists() and capability != "AVX512":
        return f"built for AVX-512, and this CPU has {capability}"
    return _load("_cpu", "a C++ compiler")


@cache
def load_cuda() -> str:
    """Load the operators for GPUs, which a CPU build of torch can too: "available", or why they cannot be used."""
    return _load("_cuda", "nvcc")


@cache
def warn_without_cuda() -> None:
    """Say once why operators on a GPU run in plain torch; for their fallbacks, which call it with tensors on a GPU."""
    state = load_cuda()
    if state != "available":
        message = f"opsdl: operators of shared prefixes run in plain torch on this GPU: csrc/cuda is {state}"
        warnings.warn(message, stacklevel=3)


def _library(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.so")


def _load(name: str, needs: str) -> str:
    if not _library(name).exists():
        return f"not built (it needs {needs} and pip install --no-build-isolation)"
    try:
        torch.ops.load_library(_library(name))
    except OSError as error:
        return f"built for another torch ({str(error).splitlines()[0]})"
    return "available"
