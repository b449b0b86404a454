"""prefix.md and the README's table of a whole model over a shared prefix, from a result of bench.prefix."""

from __future__ import annotations

from bench.results import Result, origin
from bench.tables import Report, Table, fixed, mib, scientific

ROWS = {
    "student, forward and backward, exact": ("student", "exact", "separate"),
    "student, prefix detached (with its prefill)": ("student", "detached", "separate"),
    "rollout, beside transformers' `generate`": ("rollout", "ours", "transformers"),
}
PEAKS = {"student's step, exact": "exact", "student's step, prefix detached": "detached"}


def report(result: Result) -> Report:
    times, memory = times_of(result), memory_of(result)
    settings = result.settings
    difference, pool = result.only("exact", what="student").value("difference"), result.only("pool")
    text = f"""\
# A whole model over a shared prefix

{settings["model"]}, {settings["parameters"] / 1e6:.0f} million parameters, P = {settings["P"]}, G = {settings["G"]},
T = {settings["T"]}, bfloat16 autocast, medians of {settings["rounds"]} rounds in which the ways take turns. The ideal
is what the counts of tokens alone give.

{origin(result)}

Seconds:

{times.markdown()}

Peak memory, MiB:

{memory.markdown()}

{_sum_of_peaks(result)}Hidden states of the two differ by {scientific(difference)} (bfloat16 rounds at 4e-3).
Keys and values of all {settings["G"]} responses at their full length, in blocks of a pool:
{fixed(pool.value("of one sequence"))} times those of one sequence, {fixed(pool.value("of distinct tokens"), 3)} times
those of all distinct tokens; before the first token of a response, those of the prefix alone.
"""
    return Report(text, {"prefix-time": times, "prefix-memory": memory})


def times_of(result: Result) -> Table:
    G, P, T = (result.settings[name] for name in "GPT")
    ideal = G * (P + T) / (P + G * T)
    rows = []
    for label, (what, ours, theirs) in ROWS.items():
        chosen, bar = result.only(ours, what=what), result.only(theirs, what=what)
        seconds = [fixed(case.value("time"), 1) for case in (chosen, bar)]
        rows.append([label, *seconds, fixed(chosen.value("speedup")), fixed(ideal) if ours == "exact" else "-"])
    return Table(["seconds", "shared prefix", "separate sequences", "speedup", "ideal speedup"], rows)


def memory_of(result: Result) -> Table:
    peaks = {case.name: case.value("peak") for case in result.select(what="memory")}
    separate, rows = peaks.get("separate"), []
    for label, name in PEAKS.items():
        peak = peaks.get(name)
        share = None if peak is None or separate is None else peak / separate
        rows.append([label, mib(peak), mib(separate), fixed(share, 3)])
    return Table(["peak MiB", "shared prefix", "separate sequences", "ratio"], rows)


def _sum_of_peaks(result: Result) -> str:
    """How the peak of separate sequences was found, where it was."""
    peaks = {case.name: case.value("peak") for case in result.select(what="memory")}
    if "separate" not in peaks:
        return ""
    return (
        "The separate sequences at once would take more memory than a small machine has: their peak is that of one,\n"
        f"{mib(peaks['first'])} MiB, and {result.settings['G'] - 1} times what a second one adds,"
        f" {mib(peaks['second'])} MiB; in time they run one after another.\n"
    )
