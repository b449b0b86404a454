"""What this machine and installation offer, for `opsdl info` and for bug reports."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import opsdl
from opsdl import extension
from opsdl.losses import available_backends

PACKAGES = ("torch", "triton", "transformers", "flash-attn")


def info() -> dict[str, str]:
    """What is there, in the order to print: versions, devices, and each loss backend or why it is missing."""
    facts = {"opsdl": opsdl.__version__, "python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: _version(name) for name in PACKAGES}
    capability = torch.backends.cpu.get_cpu_capability()
    facts["cpu"] = f"{capability}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    facts["cuda"] = _cuda()
    facts |= {f"loss backend {name}": state for name, state in available_backends().items()}
    return facts | {"operators for CPUs": extension.load(), "operators for CUDA": extension.load_cuda()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"no device (torch is built for CUDA {torch.version.cuda})"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (torch is built for CUDA {torch.version.cuda})"
