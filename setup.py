"""What pyproject.toml cannot say: `kernels/` is installed as `opsdl.kernels`, and csrc/ is compiled where that can be.

The extensions need the torch they will run with: `pip install --no-build-isolation .` builds them, as `make setup`
does. Where there is no torch or no compiler, the package installs without them, and `opsdl info` says so. Where there
is a compiler that works, a file of ours that does not compile fails the installation.

    OPSDL_BUILD_CUDA=auto|0|1       csrc/cuda where there is an nvcc (default), never, or fail without. With auto, an
                                    nvcc that fails is an error where there is a GPU, and else a warning.
    TORCH_CUDA_ARCH_LIST            default "8.0;9.0;10.0+PTX"
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup

PACKAGES = {
    "packages": [*find_packages(include=["opsdl*"]), "opsdl.kernels"],
    "package_dir": {"opsdl.kernels": "kernels"},
}
# AVX-512 throughout; the functions that need more ask the CPU first.
CPU_FLAGS = ["-std=c++20", "-O3", "-march=x86-64-v4", "-fopenmp", "-fno-math-errno", "-Wno-maybe-uninitialized"]
PROBE = (
    "#include <Python.h>\n#include <omp.h>\n#include <concepts>\nint main() { return omp_get_max_threads() == 0; }\n"
)


def wanted_cuda():
    """The value of OPSDL_BUILD_CUDA."""
    wanted = os.environ.get("OPSDL_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"OPSDL_BUILD_CUDA={wanted}: expected auto, 0 or 1")
    return wanted


def nvcc():
    """Path of the compiler for csrc/cuda, or None where it is not wanted or not there."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if wanted_cuda() == "1" and not found:
        raise SystemExit("OPSDL_BUILD_CUDA=1: no nvcc on PATH or in $CUDA_HOME/bin")
    return found if wanted_cuda() != "0" else None


def has_gpu():
    """Whether this machine has an NVIDIA GPU, by its driver or by torch."""
    driver = shutil.which("nvidia-smi")
    if driver and subprocess.run([driver, "-L"], capture_output=True).returncode == 0:
        return True
    import torch

    return torch.cuda.is_available()


def broken_compiler():
    """Why the C++ compiler cannot build any extension of Python, or None where it can."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        command = [*compiler, *CPU_FLAGS, f"-I{sysconfig.get_path('include')}", "-c", str(source), "-o", f"{source}.o"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
    return f"{' '.join(compiler)}: {last_error(done.stderr)}" if done.returncode else None


def last_error(text):
    """The last line of a compiler's output that speaks of an error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it fails without a word"]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])


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


def build_cuda(compiler, torch_folder, output):
    """Compile csrc/cuda. A failure ends the installation where CUDA was asked for or a GPU is; else it is a warning."""
    os.makedirs(os.path.dirname(output), exist_ok=True)
    done = subprocess.run(nvcc_command(compiler, torch_folder, output), capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode == 0:
        return
    why = f"csrc/cuda was not compiled: {last_error(done.stdout + done.stderr)}"
    if wanted_cuda() == "1" or has_gpu():
        raise SystemExit(f"opsdl: {why}; OPSDL_BUILD_CUDA=0 installs without it")
    for stale in (output, "opsdl/_cuda.so"):  # of an earlier build: what is loaded must be what the sources say
        Path(stale).unlink(missing_ok=True)
    print(f"opsdl: warning: {why}", file=sys.stderr)


def without(why):
    """No arguments for setuptools; fails where the extensions were asked for."""
    if wanted_cuda() == "1":
        raise SystemExit(f"OPSDL_BUILD_CUDA=1: the extensions cannot be built: {why}")
    print(f"opsdl: installing without the extensions: {why}", file=sys.stderr)
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
    if why := broken_compiler():
        return without(f"no C++ compiler that works ({why})")
    compiler, torch_folder = nvcc(), Path(torch.__file__).parent

    class Build(BuildExtension):
        def build_extension(self, extension):
            if extension.name == "opsdl._cuda":
                build_cuda(compiler, torch_folder, self.get_ext_fullpath(extension.name))
            else:
                super().build_extension(extension)

    modules = [
        CppExtension(
            "opsdl._cpu",
            sources=sorted(str(path) for path in Path("csrc/cpu").rglob("*.cpp")),
            depends=[str(path) for path in Path("csrc/cpu").rglob("*.h")],
            include_dirs=[str(Path("csrc/cpu").resolve())],
            extra_compile_args=CPU_FLAGS,
            extra_link_args=["-fopenmp"],
        ),
        CppExtension("opsdl._blocks", sources=["csrc/bindings/blocks.cpp"], extra_compile_args=["-std=c++20", "-O2"]),
    ]
    if compiler:  # not torch's CUDAExtension, which links a CUDA build of torch
        depends = [str(path) for path in Path("csrc/cuda").iterdir()]
        # Optional, so that setuptools does not miss its library after a warning.
        modules.append(Extension("opsdl._cuda", sources=[], depends=depends, optional=True))
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)}}


setup(**PACKAGES, **extensions())
