"""What pyproject.toml cannot say: `kernels/` is installed as `opsdl.kernels`, and csrc/ is compiled where that can be.

The extension needs the torch it will run with: `pip install --no-build-isolation .` builds it, as `make setup` does.
Elsewhere, and where the compiler is missing or fails, the package installs without it; `opsdl info` says so.
"""

import platform
from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = {
    "packages": [*find_packages(include=["opsdl*"]), "opsdl.kernels"],
    "package_dir": {"opsdl.kernels": "kernels"},
}


def extension():
    """Arguments that make setuptools compile csrc/cpu with ninja, or none."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("opsdl: no torch in the build environment; installing without the C++ extension")
        return {}
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        print("opsdl: the C++ extension is for x86-64 Linux; installing without it")
        return {}

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # whatever a compiler can fail with; the package works without the extension
                print(f"opsdl: the C++ extension was not built: {error}")
                self.extensions = []

    module = CppExtension(
        "opsdl._cpu",
        sources=sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=[str(path) for path in Path("csrc/cpu").glob("*.h")],
        # AVX-512 throughout; the one function that needs more asks the CPU first.
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-march=x86-64-v4",
            "-fopenmp",
            "-fno-math-errno",
            "-Wno-maybe-uninitialized",
        ],
        extra_link_args=["-fopenmp"],
    )
    blocks = CppExtension(
        "opsdl._blocks", sources=["csrc/bindings/blocks.cpp"], extra_compile_args=["-std=c++20", "-O2"]
    )
    build = Build.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [module, blocks], "cmdclass": {"build_ext": build}}


setup(**PACKAGES, **extension())
