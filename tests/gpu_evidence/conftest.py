"""Kernels without a GPU: interpreted, compiled ahead of time, and their PTX executed by an emulator (tools/)."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


def pytest_report_header():
    return "tests/gpu_evidence: not collected, triton is not installed" if collect_ignore_glob else None
