"""The package as it is where nothing was compiled: shared prefixes on the fallbacks in torch and Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_shared_prefixes_work_uncompiled(tmp_path):
    shutil.copytree(ROOT / "opsdl", tmp_path / "opsdl", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(
        ROOT / "tests",
        tmp_path / "tests",
        ignore=shutil.ignore_patterns("gpu_evidence", "bench", "tools", "__pycache__"),
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*command):
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, env=environment)

    where = run("-c", "import opsdl.extension as e; print(e.__file__, e.load())").stdout
    assert where.startswith(str(tmp_path)) and "not built" in where
    folders = [f"tests/prefix/{name}" for name in ("attention", "memory", "layouts")]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *folders, "-k", "not ten_thousand")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
