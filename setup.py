"""What pyproject.toml cannot say: `kernels/` is installed as `opsdl.kernels`, and csrc/ is compiled where that can be.

The extensions need the torch they will run with: `pip install --no-build-isolation .` builds them, as `make setup`
does. Elsewhere, and where a compiler is missing or fails, the package installs without; `opsdl info` says so.

    OPSDL_BUILD_CUDA=auto|0|1       csrc/cuda where there is an nvcc (default), never, or fail without
    TORCH_CUDA_ARCH_LIST            default "8.0;9.0;10.0+PTX"
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.errors import CompileError

PACKAGES = {
    "packages": [*find_packages(include=["opsdl*"]), "opsdl.kernels"],
    "package_dir": {"opsdl.kernels": "kernels"},
}


def nvcc():
    """Path of the compiler for csrc/cuda, or None where it is not wanted or not there."""
    wanted = os.environ.get("OPSDL_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"OPSDL_BUILD_CUDA={wanted}: expected auto, 0 or 1")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if wanted == "1" and not found:
        raise SystemExit("OPSDL_BUILD_CUDA=1: no nvcc on PATH or in $CUDA_HOME/bin")
    return found if wanted != "0" else None


def nvcc_command(compiler, torch_folder, output):
    """One library for every architecture and torch >= 2.10, CPU builds included: the stable ABI, libcudart inside."""
    code = []
    for arch in (os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX").replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        code += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if arch.endswith("+PTX"):
            code += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return [
        compiler, "-std=c++20", "-O3", "-t", "2", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", *code,
        "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-I{torch_folder}/include",
        "csrc/cuda/operators.cu", "-o", output, f"-L{torch_folder}/lib", "-Xlinker", "--no-as-needed", "-ltorch_cpu",
        "-ltorch",
    ]  # fmt: skip


def without(why):
    if os.environ.get("OPSDL_BUILD_CUDA") == "1":
        raise SystemExit(f"OPSDL_BUILD_CUDA=1: the extensions cannot be built: {why}")
    print(f"opsdl: installing without the extensions: {why}")
    return {}


def extensions():
    """Arguments that make setuptools compile csrc/ with ninja, or none."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return without("no torch in the build environment")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return without("they are for x86-64 Linux")
    compiler = nvcc()

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # whatever a compiler can fail with; the package works without the extensions
                if os.environ.get("OPSDL_BUILD_CUDA") == "1":
                    raise
                print(f"opsdl: the C++ extension was not built: {error}")
                self.extensions = []

        def build_extension(self, extension):
            if extension.name != "opsdl._cuda":
                return super().build_extension(extension)
            output = self.get_ext_fullpath(extension.name)
            os.makedirs(os.path.dirname(output), exist_ok=True)
            command = nvcc_command(compiler, Path(torch.__file__).parent, output)
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"opsdl: the CUDA extension was not built: {error}")
                raise CompileError("csrc/cuda") from error

    modules = [
        CppExtension(
            "opsdl._cpu",
            sources=sorted(str(path) for path in Path("csrc/cpu").rglob("*.cpp")),
            depends=[str(path) for path in Path("csrc/cpu").rglob("*.h")],
            include_dirs=[str(Path("csrc/cpu").resolve())],
            # AVX-512 throughout; the functions that need more ask the CPU first.
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-march=x86-64-v4",
                "-fopenmp",
                "-fno-math-errno",
                "-Wno-maybe-uninitialized",
            ],
            extra_link_args=["-fopenmp"],
        ),
        CppExtension("opsdl._blocks", sources=["csrc/bindings/blocks.cpp"], extra_compile_args=["-std=c++20", "-O2"]),
    ]
    if compiler:
        # Not torch's CUDAExtension, which links a CUDA build of torch.
        optional = os.environ.get("OPSDL_BUILD_CUDA", "auto") == "auto"
        depends = [str(path) for path in Path("csrc/cuda").iterdir()]
        modules.append(Extension("opsdl._cuda", sources=[], depends=depends, optional=optional))
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)}}


setup(**PACKAGES, **extensions())
