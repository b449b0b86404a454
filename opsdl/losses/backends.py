"""The one place where a backend is chosen: the formula of reference.py, or one of the engines."""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
import torch.distributed as dist

from opsdl.losses.engines import ENGINES

# Found out at import: torch.compile traces `choose`, and what it reads must be constants by then.
_STATES = {"reference": "available"} | {name: engine.state() for name, engine in ENGINES.items()}
_BEST = {engine.device: name for name, engine in ENGINES.items()}  # by type of device; None: on any other
_GENERAL = {"reference"} | {name for name, engine in ENGINES.items() if engine.general}
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # then Triton kernels run on CPU tensors


def available_backends() -> dict[str, str]:
    """Say which loss backends can be used here.

    Returns:
        The name of each backend -> "available", or why it is not.
    """
    states = dict(_STATES)
    if states["triton"] == "available" and not (torch.cuda.is_available() or _INTERPRETING):
        states["triton"] = "installed, but there is no GPU"
    return states


def check_backend(wanted: str) -> None:
    """Raise ValueError unless there is a backend of that name, usable here or not."""
    if wanted != "auto" and wanted not in _STATES:
        raise ValueError(f"backend: {wanted!r}; expected 'auto' or one of {', '.join(_STATES)}")


def choose(
    wanted: str, dtype: torch.dtype, device: torch.device, beta: float, vocab_group: dist.ProcessGroup | None
) -> str:
    """Return the backend for products of this dtype on this device.

    Raises:
        ValueError: The wanted one is missing, or cannot do what is asked.
    """
    if wanted == "auto":
        return _best(dtype, device, beta)
    if _STATES[wanted] != "available":
        raise ValueError(f"backend: {wanted!r} is {_STATES[wanted]}")
    if wanted == "reference" and vocab_group is not None:
        raise ValueError("vocab_group: given with backend 'reference'; expected None there")
    if wanted not in _GENERAL:
        if beta != 1:
            raise ValueError(f"beta: {beta} with backend {wanted!r}; expected 1 there, or backend 'torch'")
        if dtype == torch.float64:
            raise ValueError(f"student_hidden: torch.float64 with backend {wanted!r}; expected backend 'torch'")
        if (device.type == "cpu") != (_BEST.get("cpu") == wanted or _INTERPRETING):
            raise ValueError(f"backend: {wanted!r} cannot take tensors on {device}")
    return wanted


def _best(dtype: torch.dtype, device: torch.device, beta: float) -> str:
    fallback = _BEST[None]
    if beta != 1 or dtype == torch.float64:
        return fallback
    best = _BEST.get(device.type, fallback)
    if _STATES[best] != "available":
        _say_once(f"opsdl: loss backend {best!r} is {_STATES[best]}; using {fallback!r}")
        return fallback
    return best


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=6)  # where the user calls the loss
