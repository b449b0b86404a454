"""csrc/cpu for a CPU with AVX2: emulated intrinsics (intrinsics.h), and torch's product in float32 (brgemm.cpp)."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cpu"
FLAGS = [
    *("-std=c++20", "-O2", "-march=x86-64-v3", "-fopenmp", "-fno-math-errno", "-fPIC"),
    # psabi: vectors wider than the CPU's are passed in another way than elsewhere; all callers are compiled like this.
    *("-Wno-psabi", "-Wno-maybe-uninitialized"),
    *("-DOPSDL_EMULATED", "-include", str(HERE / "intrinsics.h")),
]


def build(folder: Path) -> Path:
    """Compile csrc/cpu, a file on each core, and make the folder one for PYTHONPATH.

    Args:
        folder: Made if it is not there. Gets `_cpu.so`, and the module that puts it in the place of the package's.

    Returns:
        The library.

    Raises:
        subprocess.CalledProcessError: g++ refuses a source, and has said why on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (SOURCES, *cpp_extension.include_paths())]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"

    def compiled(source: Path) -> str:
        output = str(folder / f"{source.stem}.o")
        subprocess.run(["g++", *FLAGS, abi, *includes, "-c", str(source), "-o", output], check=True)
        return output

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compiled, [*sorted(SOURCES.rglob("*.cpp")), HERE / "brgemm.cpp"]))
    library = folder / "_cpu.so"
    torch_libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"]
    link = ["g++", "-shared", "-fopenmp", "-Wl,-Bsymbolic-functions", *objects, *torch_libraries, "-o", str(library)]
    subprocess.run(link, check=True)
    shutil.copy(HERE / "sitecustomize.py", folder)
    return library
