"""A checkout that nobody installed: its packages made importable, its extensions built in place."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_importable() -> None:
    """Make `opsdl` of this checkout importable, with `kernels/` as `opsdl.kernels`, which only an installation maps."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import opsdl

    if importlib.util.find_spec("opsdl.kernels") is None:
        folder = ROOT / "kernels"
        spec = importlib.util.spec_from_file_location(
            "opsdl.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["opsdl.kernels"] = module
        spec.loader.exec_module(module)
        opsdl.kernels = module  # as an import would set it


def build(architecture: str) -> str | None:
    """Compile csrc/ into opsdl/ for one GPU architecture.

    Args:
        architecture: As in TORCH_CUDA_ARCH_LIST: "9.0".

    Returns:
        The end of the compiler's output where it failed, else None.
    """
    environment = {**os.environ, "OPSDL_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return (done.stdout + done.stderr)[-2000:] if done.returncode else None
