"""The launchers of opsdl.kernels with something else in the place of the GPU.

`substituted(run)` puts objects in the place of the three kernels that call run(Launch) instead of launching, so that
the shipped launcher code, grids, tile sizes and specialisations are what is compiled or emulated.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tools import ptxsim, triton_aot


class Launch(NamedTuple):
    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors and numbers, by parameter
    constants: dict[str, Any]
    options: dict[str, int]
    divisible_by_16: list[str]


class _Substitute:
    def __init__(self, name: str, kernel: Any, run: Callable[[Launch], Any]):
        self.name, self.kernel, self.run = name, kernel, run

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*values: Any, **constants: Any) -> None:
            options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            arguments = dict(zip(self.kernel.arg_names, values, strict=False))
            # What Triton's own launcher specialises: absent pointers, ones, multiples of 16.
            fixed = {name: x for name, x in arguments.items() if x is None or (type(x) is int and x == 1)}
            arguments = {name: x for name, x in arguments.items() if name not in fixed}
            by_16 = [name for name, x in arguments.items() if type(x) is int and x % 16 == 0]
            self.run(Launch(self.name, self.kernel, grid, arguments, {**constants, **fixed}, options, by_16))

        return launch


@contextlib.contextmanager
def substituted(run: Callable[[Launch], Any], package: str = "opsdl.kernels") -> Iterator[None]:
    """Within: the launchers of the package call `run`."""
    forward, backward = (importlib.import_module(f"{package}.{name}") for name in ("forward", "backward"))
    places = [(forward, "moments_kernel"), (backward, "gradient_kernel"), (backward, "product_kernel")]
    kernels = [getattr(module, name) for module, name in places]
    try:
        for (module, name), kernel in zip(places, kernels, strict=True):
            setattr(module, name, _Substitute(name, kernel, run))
        yield
    finally:
        for (module, name), kernel in zip(places, kernels, strict=True):
            setattr(module, name, kernel)


def emulate(launch: Launch, arch: int, **options: Any) -> ptxsim.RunReport:
    """Compile the launch for sm_<arch> and execute its PTX on the CPU."""
    return ptxsim.run_triton(
        launch.kernel, launch.grid, launch.arguments, launch.constants, arch, launch.options["num_warps"],
        launch.options["num_stages"], divisible_by_16=launch.divisible_by_16, **options,
    )  # fmt: skip


def compiled(launch: Launch, arch: int | str) -> triton_aot.Compiled:
    types = {name: triton_aot.argument_type(x) for name, x in launch.arguments.items()}
    return triton_aot.compile(
        launch.kernel, types, launch.constants, arch, launch.options, divisible_by_16=launch.divisible_by_16
    )
