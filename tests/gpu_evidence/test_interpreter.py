"""Interpreting excludes compiling in one process, so the interpreted tests run in another."""

import os
import subprocess
import sys
from pathlib import Path


def test_interpreted_kernels_against_float64():
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "interpreted.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
