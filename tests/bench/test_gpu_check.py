"""bench/gpu_check.py where there is no GPU: it says so, and its steps run on the CPU as they would there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu_claims import claim, failures
from bench.results import Case, Number

ROOT = Path(__file__).parents[2]


def check(*arguments):
    """Run the script as its documentation says, with nothing that points to the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT.parent)


def test_a_dry_run_goes_through_every_step(tmp_path):
    done = check("--dry", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    cases = json.loads((tmp_path / "gpu_check.json").read_text())["cases"]
    assert {case["name"] for case in cases} == {"loss error", "prefix error", "loss time", "decode time"}
    assert "## Decoding" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run():
    done = check()
    assert done.returncode == 2
    assert "no GPU here" in done.stdout


def test_what_makes_it_fail():
    def measured(error):
        return Case(
            "loss error", "one head", {"dtype": "float32"}, {"error": Number(error, "1"), "limit": Number(1e-6, "1")}
        )

    assert failures([measured(1e-7), claim("loaded", True)]) == []
    assert len(failures([measured(1e-5), measured(float("nan")), claim("loaded", False, "not built")])) == 3
