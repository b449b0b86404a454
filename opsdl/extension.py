"""The compiled part of the library, if it was built: operators in torch.ops.opsdl once `load` says "available"."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


@cache
def load() -> str:
    """Load the extension: "available", or why it cannot be used here."""
    library = Path(__file__).parent / "_cpu.so"
    if not library.exists():
        return "not built (it needs a C++ compiler and pip install --no-build-isolation)"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return f"built for AVX-512, and this CPU has {torch.backends.cpu.get_cpu_capability()}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"built for another torch ({str(error).splitlines()[0]})"
    return "available"
