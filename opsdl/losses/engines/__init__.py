"""The engines by name. To add one, write its file (`engine.py` says what it must do) and its line in `ENGINES`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from opsdl import extension
from opsdl.losses.call import Call
from opsdl.losses.engine import Engine


class Entry(NamedTuple):
    """What is known of an engine before its module is imported."""

    place: str  # module:class
    state: Callable[[], str]  # says "available", or why the engine cannot be used here
    device: str | None = None  # the type of device that it is made for, and the first choice on; None: it takes any
    general: bool = False  # takes float64, and is a MixingEngine


def _always() -> str:
    return "available"


def _triton() -> str:
    try:
        return "available" if importlib.util.find_spec("triton") else "not installed"
    except ModuleNotFoundError:
        return "not installed"


ENGINES = {
    "torch": Entry("opsdl.losses.engines.torch:TorchEngine", _always, general=True),
    "cpu": Entry("opsdl.losses.engines.cpu:CpuEngine", extension.load, device="cpu"),
    "triton": Entry("opsdl.losses.engines.triton:TritonEngine", _triton, device="cuda"),
}


def make(call: Call, count: int) -> Engine:
    """Return the engine of the call's backend, for `count` unmasked tokens; its module is imported now."""
    module, name = ENGINES[call.backend].place.split(":")
    engine: Engine = getattr(import_module(module), name)(call, count)
    return engine
