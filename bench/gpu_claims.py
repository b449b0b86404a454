"""What must hold for bench/gpu_check.py to pass."""

from __future__ import annotations

from bench.results import Case, Number


def claim(label: str, holds: bool, why: str = "") -> Case:
    """A case that says whether something holds, and if not, why."""
    return Case("claim", label, {"why": why}, {"holds": Number(float(holds), "1")})


def failures(cases: list[Case]) -> list[str]:
    """What does not hold: claims, and errors above their limits."""
    broken = [f"{case.label}: {case.of['why']}" for case in cases if case.value("holds") == 0]
    for case in cases:
        error, limit = case.value("error"), case.value("limit")
        if error is not None and limit is not None and not error <= limit:  # NaN is a failure too
            broken.append(f"{case.label}, {', '.join(map(str, case.of.values()))}: error {error:.1e} > {limit:.1e}")
    return broken
