"""The one place where a backend is chosen."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache

import torch
import torch.distributed as dist

from opsdl import extension


def _triton() -> str:
    try:
        return "available" if importlib.util.find_spec("triton") else "not installed"
    except ModuleNotFoundError:
        return "not installed"


# Found out at import: torch.compile traces `choose`, and what it reads must be constants by then.
_STATES = {"reference": "available", "torch": "available", "cpu": extension.load(), "triton": _triton()}
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # then Triton kernels run on CPU tensors


def available_backends() -> dict[str, str]:
    """Name of each loss backend -> "available", or why it is not."""
    states = dict(_STATES)
    if states["triton"] == "available" and not (torch.cuda.is_available() or _INTERPRETING):
        states["triton"] = "installed, but there is no GPU"
    return states


def choose(
    wanted: str, dtype: torch.dtype, device: torch.device, beta: float, vocab_group: dist.ProcessGroup | None
) -> str:
    """The backend for products of this dtype on this device.

    Raises ValueError where the wanted one is unknown, missing, or cannot do what is asked.
    """
    if wanted == "auto":
        return _best(dtype, device, beta)
    if wanted not in _STATES:
        raise ValueError(f"backend: {wanted!r}; expected 'auto' or one of {', '.join(_STATES)}")
    if _STATES[wanted] != "available":
        raise ValueError(f"backend: {wanted!r} is {_STATES[wanted]}")
    if wanted == "reference" and vocab_group is not None:
        raise ValueError("vocab_group: given with backend 'reference'; expected None there")
    if wanted in ("cpu", "triton"):
        if beta != 1:
            raise ValueError(f"beta: {beta} with backend {wanted!r}; expected 1 there, or backend 'torch'")
        if dtype == torch.float64:
            raise ValueError(f"student_hidden: torch.float64 with backend {wanted!r}; expected backend 'torch'")
        if (device.type == "cpu") != (wanted == "cpu" or _INTERPRETING):
            raise ValueError(f"backend: {wanted!r} cannot take tensors on {device}")
    return wanted


def _best(dtype: torch.dtype, device: torch.device, beta: float) -> str:
    if beta != 1 or dtype == torch.float64:
        return "torch"
    best = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "torch")
    if _STATES[best] != "available":
        _say_once(f"opsdl: loss backend {best!r} is {_STATES[best]}; using 'torch'")
        return "torch"
    return best


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=6)  # where the user calls the loss
