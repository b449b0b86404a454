"""The package as users import it: light, lazy, whole, and useful without the optional packages."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import opsdl

PACKAGE = Path(opsdl.__file__).parent

# Installed before anything else, this makes packages behave as if they were not there.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(code: str, blocked: tuple[str, ...] = (), cwd: Path | None = None) -> str:
    """The output of `code` in a new interpreter in which `blocked` packages cannot be imported."""
    program = f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_adds_little_to_torch():
    code = "import time, torch; start = time.perf_counter(); import opsdl; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(5)) < 0.3


def test_import_and_losses_leave_heavy_packages_alone():
    code = """
import sys, opsdl
print(*sys.modules)
opsdl.fused_reverse_kl, opsdl.reference
print(*sys.modules)
"""
    after_import, after_losses = (set(line.split()) for line in python(code).splitlines())
    assert "torch" not in after_import
    assert not {"transformers", "triton", "omegaconf", "matplotlib"} & after_losses


def test_losses_run_with_torch_alone():
    code = """
import torch, opsdl
hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(11, 8)
opsdl.fused_reverse_kl(hidden, weight, torch.randn(3, 8)).backward()
print(hidden.grad.isfinite().all().item())
"""
    assert python(code, ("transformers", "triton", "omegaconf", "matplotlib", "gguf", "tqdm")).strip() == "True"


def test_tests_of_the_losses_start_without_transformers():
    code = """
import sys, pytest
pytest.main(["--collect-only", "-qqq", "-p", "no:cacheprovider", "tests/losses"])
print("transformers" in sys.modules)
"""
    assert python(code, cwd=PACKAGE.parent).splitlines()[-1] == "False"


@pytest.mark.parametrize("name", opsdl.__all__)
def test_public_names_resolve(name):
    assert getattr(opsdl, name) is not None
    assert name in dir(opsdl)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(opsdl.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert sorted(name.asname for line in block.body for name in line.names) == opsdl.__all__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fused_forward_kl'"):
        opsdl.fused_forward_kl  # noqa: B018


def test_every_folder_with_modules_is_a_package():
    """setuptools leaves out the others, and only an installed copy would show it."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["train", "recipes/any.yaml"], "omegaconf"),
        (["eval", "recipes/any.yaml"], "omegaconf"),
        (["prepare", __file__, "--model", "m", "--out", "new.jsonl"], "transformers"),
    ],
)
def test_command_without_its_packages_says_what_to_install(arguments, missing):
    blocked = ("omegaconf", "transformers")
    code = f"""
import sys
from opsdl.cli.main import main
sys.stderr = sys.stdout
print(main({arguments!r}))
"""
    line, exit_code = python(code, blocked).splitlines()
    assert exit_code == "2"
    assert f"No module named '{missing}'" in line and "pip install 'opsdl[train]'" in line


def test_info_needs_torch_only():
    code = "from opsdl.cli.main import main; main(['info'])"
    assert "loss backend reference" in python(code, ("transformers", "triton", "omegaconf"))


@pytest.fixture
def checkout(tmp_path):
    """A copy of what setup.py reads, with nothing built."""
    root = PACKAGE.parent
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    for name in ("opsdl", "kernels", "csrc"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def build(checkout, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_builds_without_a_compiler_that_works(checkout):
    """The package is made without its extension, and says so."""
    done = build(checkout, CC="false", CXX="false")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "installing without the extensions: no C++ compiler that works" in done.stderr
    assert not list(checkout.glob("opsdl/*.so"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_a_source_of_ours_that_does_not_compile_is_an_error(checkout):
    for source in (checkout / "csrc" / "cpu").rglob("*.cpp"):
        source.write_text("#error broken on purpose\n")
    done = build(checkout, OPSDL_BUILD_CUDA="0")
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr


@pytest.fixture
def fake_nvcc(tmp_path):
    """A folder with an nvcc that fails, and a driver that reports a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in (
        ("nvcc", "echo 'operators.cu(1): error: broken on purpose' >&2; exit 1"),
        ("nvidia-smi", "exit 0"),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
@pytest.mark.parametrize("gpu", [False, True], ids=["no GPU", "GPU"])
def test_a_failed_cuda_build_is_an_error_where_a_gpu_is(checkout, fake_nvcc, gpu):
    for source in (checkout / "csrc").rglob("*.cpp"):
        source.write_text("")
    if not gpu:
        (fake_nvcc / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    done = build(checkout, PATH=f"{fake_nvcc}{os.pathsep}{os.environ['PATH']}", OPSDL_BUILD_CUDA="auto")
    assert (done.returncode != 0) == gpu, done.stderr[-2000:]
    assert "csrc/cuda was not compiled: operators.cu(1): error: broken on purpose" in done.stderr
