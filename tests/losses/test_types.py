"""What a type checker makes of the public losses: the README's example, and the statistics by return_stats."""

from pathlib import Path

import pytest

USAGE = """
import torch
import opsdl

def use(hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, flag: bool) -> None:
    loss = opsdl.fused_reverse_kl(hidden, head, hidden, mask=mask)
    loss.backward()
    opsdl.fused_policy_reverse_kl(hidden, head, hidden, None, tokens, baseline="kl").backward()
    opsdl.fused_log_prob(hidden, head, tokens, return_stats=False).sum().backward()
    value, stats = opsdl.fused_reverse_kl(hidden, head, hidden, beta=0.5, return_stats=True)
    stats["kl"].mean(), value.backward()
    opsdl.FusedReverseKL(temperature=2.0, return_stats=True)(hidden, head, hidden)
"""
MISUSE = """
import torch
import opsdl

def misuse(x: torch.Tensor, flag: bool) -> None:
    opsdl.fused_reverse_kl(x, x, x, return_stats=flag).backward()
    opsdl.fused_reverse_kl(x, x, x, return_stats=True).backward()
    opsdl.fused_reverse_kl(x, x, x, temprature=2.0)
    opsdl.fused_log_prob(x, x, x, beta=0.5)
    opsdl.FusedLogProb(temprature=2.0)
"""


@pytest.mark.slow
def test_usage_type_checks_and_misuse_does_not(tmp_path, monkeypatch):
    mypy = pytest.importorskip("mypy.api")
    monkeypatch.setenv("MYPYPATH", str(Path(__file__).parents[2]))
    (tmp_path / "usage.py").write_text(USAGE)
    (tmp_path / "misuse.py").write_text(MISUSE)
    report, errors, _ = mypy.run(["--follow-imports=silent", "--cache-dir", str(tmp_path / "cache"), str(tmp_path)])
    assert not errors and "usage.py" not in report, report
    lines = {int(line.split(":")[1]) for line in report.splitlines() if "misuse.py" in line}
    assert lines == {6, 7, 8, 9, 10}, report
