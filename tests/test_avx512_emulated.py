"""The tests of csrc/cpu on a CPU without AVX-512, where they skip themselves: the library of tools/avx512 runs them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tools import avx512

ROOT = Path(__file__).parents[1]
CAPABILITY = torch.backends.cpu.get_cpu_capability()
FOLDERS = ["tests/losses", "tests/prefix/attention", "tests/prefix/layouts", "tests/prefix/memory"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CAPABILITY != "AVX2", reason=f"emulates AVX-512 on a CPU with AVX2; this one has {CAPABILITY}"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here"),
]


def skip_reasons(report: Path) -> Iterator[tuple[str, str]]:
    """Yield name and reason of every test in a report of pytest in JUnit's form; the reason is empty where it ran."""
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        yield f"{case.get('classname')}.{case.get('name')}", "" if skipped is None else skipped.get("message", "")


def test_what_needs_avx512_passes_emulated(tmp_path):
    library = avx512.build(tmp_path / "library")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(library.parent), str(ROOT)])}
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *FOLDERS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    reasons = dict(skip_reasons(report))
    assert any("[cpu" in name and not reason for name, reason in reasons.items())
    assert not [reason for reason in reasons.values() if "C++ extension" in reason or "'cpu'" in reason]
