"""bench/results/gpu_check.md from gpu_check.json."""

from __future__ import annotations

from bench.gpu_loss import TIMES_PLAIN_TORCH
from bench.results import Case, Result, origin
from bench.tables import Report, Table, fixed, message, mib, scientific

HEADER = """\
# The kernels on a GPU

{origin}

Errors are relative (Frobenius) against float64 on the same inputs. A loss passes when its error is at most {times:g}
times that of backend "torch" at the same dtype. Times are medians of forward and backward to dHidden and dHead; extra
MiB is the peak of allocated memory beyond the inputs, gradients included.
"""


def report(result: Result) -> Report:
    """All tables of what was measured so far."""
    parts = [HEADER.format(origin=origin(result), times=TIMES_PLAIN_TORCH)]
    for title, table in (
        ("What must hold", claims(result)),
        ("Errors", errors(result)),
        ("Decoding", decoding(result)),
    ):
        if table.rows:
            parts.append(f"## {title}\n\n{table.markdown()}\n")
    for N, H, V in result.distinct("N", "H", "V"):
        parts.append(f"## Reverse KL, N={N} H={H} V={V}, bf16\n\n{times(result, N, H, V).markdown()}\n")
    return Report("\n".join(parts), {})


def claims(result: Result) -> Table:
    rows = [
        [case.label, "yes" if case.value("holds") else "NO", message(case.of["why"])] for case in result.select("claim")
    ]
    return Table(["claim", "holds", "why not"], rows)


def errors(result: Result) -> Table:
    def row(case: Case) -> list[str]:
        error, limit = case.value("error"), case.value("limit")
        within = error is not None and limit is not None and error <= limit
        what = case.of.get("result") or case.of.get("shape", "")
        return [
            case.of["dtype"],
            case.label,
            str(what),
            scientific(error),
            scientific(limit),
            "" if within else "too large",
        ]

    cases = [*result.select("loss error"), *result.select("prefix error")]
    return Table(["dtype", "of", "result", "error", "limit", "verdict"], [row(case) for case in cases])


def decoding(result: Result) -> Table:
    rows = [[case.label, fixed(case.value("time"), 3)] for case in result.select("decode time")]
    return Table(["a step over the prefix", "ms"], rows)


def times(result: Result, N: int, H: int, V: int) -> Table:
    """The times of one shape."""
    rows = []
    for case in result.select("loss time", N=N, H=H, V=V):
        time = case.value("time")
        rate = None if time is None else 4 * 2 * N * V * H / time / 1e9
        rows.append([case.label, case.missing or fixed(time), fixed(rate, 0), mib(case.value("memory"))])
    return Table(["case", "ms", "TFLOP/s of four products", "extra MiB"], rows)
