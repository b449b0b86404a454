"""loss.md, loss.png and the README's tables of the losses, from a result of bench.loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.loss_plot import plot
from bench.results import Case, Result, origin
from bench.tables import Report, Table, fixed, message, mib, percent, scientific

PEERS = {
    "fastest peer that rounds": ("plain", "plain-compiled", "liger-eager", "liger-compiled"),
    "TRL": ("trl-default", "trl-small"),
}
SHAPE = ("N", "H", "V", "dtype")
ERRORS = {"hidden_error": "dHidden", "head_error": "dHead", "kl_error": "mean KL"}


def report(result: Result) -> Report:
    sections = [_introduction(result)]
    sections += [_speeds(result, *values) for values in result.distinct(*SHAPE, what="speed")]
    sections.append("## Errors from KL 1 to 1e-7\n\n" + _ABOUT_ERRORS)
    sections += [_errors(result, *values) for values in result.distinct(*SHAPE, what="errors")]
    image = {"loss.png": partial(plot, result)}
    return Report("\n\n".join(sections) + "\n", readme_tables(result), image)


def readme_tables(result: Result) -> dict[str, Table]:
    """A row for each shape and dtype: ours beside the fastest of each kind of peer."""
    chosen = [(values, _chosen(result, *values)) for values in result.distinct(*SHAPE, what="speed")]

    def table(cell: Callable[[Case], str]) -> Table:
        rows = [
            [str(n), str(h), str(v), dtype, *("not installed" if case is None else cell(case) for case in cases)]
            for (n, h, v, dtype), cases in chosen
        ]
        return Table(["N", "H", "V", "dtype", "ours", *PEERS], rows)

    return {
        "loss-time": table(lambda case: fixed(case.value("ratio"))),
        "loss-memory": table(lambda case: mib(case.value("memory"))),
        "loss-error": table(lambda case: scientific(case.value("hidden_error"))),
    }


def _chosen(result: Result, n: int, h: int, v: int, dtype: str) -> list[Case | None]:
    """Ours, and the fastest of each kind of peer; None where none of a kind could run."""
    cases = {case.name: case for case in result.select(what="speed", N=n, H=h, V=v, dtype=dtype) if not case.missing}

    def ratio(case: Case) -> float:
        return case.numbers["ratio"].value

    found = ([cases[name] for name in names if name in cases] for names in PEERS.values())
    return [cases["opsdl-auto"], *(min(peers, key=ratio, default=None) for peers in found)]


_ABOUT_ERRORS = """\
Relative errors against float64 on the same inputs; all tokens have the same noise. The gradients are returned in the
input dtype: rounding them to bfloat16 costs 1.7e-3 by itself."""


def _introduction(result: Result) -> str:
    return f"""\
# Fused reverse KL beside its peers

Forward plus backward to dHidden and dHead; one head for student and teacher, separate hidden states. The cases take
turns in one process: {result.settings["rounds"]} rounds of two runs each, of which the second counts. Times are
medians; a ratio is the median of the ratios to the bare products of the same round, with the lowest and the highest.
Extra memory is the peak of one step in a process of its own, beyond the inputs, dHidden and dHead included. dH error is
the relative Frobenius error of dHidden against float64.

{origin(result)}

Inputs are random: logits of standard deviation 2.5, teacher noise {result.settings["noise"]}, the same for every token,
so that there is little to skip: the rows with skip "auto" show what looking for skippable tokens costs.

![ratio and memory by case](loss.png)"""


def _speeds(result: Result, n: int, h: int, v: int, dtype: str) -> str:
    conditions: dict[str, Any] = {"what": "speed", "N": n, "H": h, "V": v, "dtype": dtype}
    inputs, *cases = result.select(**conditions)
    facts = [
        f"dHidden + dHead: {mib(inputs.value('gradients'))} MiB.",
        f"KL {scientific(inputs.value('kl'))}.",
        f'Tokens left out of the backward by skip "auto": {percent(inputs.value("skipped"), 0)}.',
    ]
    header = ["case", "ms", "x products", "lowest", "highest", "extra MiB", "dH error"]
    table = Table(header, [_speed(case) for case in cases])
    return f"## N={n} H={h} V={v} {dtype}\n\n{' '.join(facts)}\n\n{table.markdown()}"


def _speed(case: Case) -> list[str]:
    if case.missing is not None:
        return [case.label, message(case.missing), *["-"] * 5]
    ratios = case.numbers["ratio"].rounds or [case.numbers["ratio"].value]
    times = [fixed(case.value("time"), 0), *(fixed(x) for x in (case.value("ratio"), min(ratios), max(ratios)))]
    return [case.label, *times, mib(case.value("memory")), scientific(case.value("hidden_error"))]


def _errors(result: Result, n: int, h: int, v: int, dtype: str) -> str:
    conditions: dict[str, Any] = {"what": "errors", "N": n, "H": h, "V": v, "dtype": dtype}
    levels = [result.select(**conditions, noise=noise) for (noise,) in result.distinct("noise", **conditions)]
    header = ["case", *(f"KL {scientific(inputs.value('kl'))}" for inputs, *_ in levels)]
    blocks = [f"### {dtype}, N={n} H={h} V={v}"]
    for number, label in ERRORS.items():
        rows = [_error_row(cases, number) for cases in zip(*(cases for _, *cases in levels), strict=True)]
        blocks += [f"Error of {label}:", Table(header, rows).markdown()]
    return "\n\n".join(blocks)


def _error_row(cases: tuple[Case, ...], number: str) -> list[str]:
    """One way at every level of KL."""
    cells = [message(case.missing) if case.missing else scientific(case.value(number)) for case in cases]
    return [cases[0].label, *cells]
