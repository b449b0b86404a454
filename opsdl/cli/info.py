"""`opsdl info`: what this machine and installation offer, for users and for bug reports."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import click

PACKAGES = ("torch", "triton", "transformers", "flash-attn")


@click.command()
def info() -> None:
    """Print versions, devices and loss backends.

    \b
    Example: opsdl info
    """
    for name, value in facts().items():
        click.echo(f"{name + ':':<26} {value}")


def facts() -> dict[str, str]:
    """Return what is there, in the order to print: versions, devices, each loss backend or why it is missing."""
    import torch

    import opsdl
    from opsdl import extension
    from opsdl.losses import available_backends

    found = {"opsdl": opsdl.__version__, "python": platform.python_version(), "platform": platform.platform()}
    found |= {name: _version(name) for name in PACKAGES}
    capability = torch.backends.cpu.get_cpu_capability()
    found["cpu"] = f"{capability}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    found["cuda"] = _cuda()
    found |= {f"loss backend {name}": state for name, state in available_backends().items()}
    return found | {"operators for CPUs": extension.load(), "operators for CUDA": extension.load_cuda()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"no device (torch is built for CUDA {torch.version.cuda})"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (torch is built for CUDA {torch.version.cuda})"
