"""loss.md, loss.png and the README's table from loss.json, without running anything again:

    python -m bench.report [DIR]

DIR is where loss.json lies, bench/results unless given; only from there the README is written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from bench.plot import plot
from opsdl.files import write_whole

RESULTS = Path(__file__).parent / "results"
README, BEGIN, END = Path(__file__).parents[1] / "README.md", "<!-- make bench -->\n", "<!-- end -->"
PEERS = {
    "fastest peer that rounds": ("plain", "plain-compiled", "liger-eager", "liger-compiled"),
    "TRL": ("trl-default", "trl-small"),
}


def write_report(out: Path) -> None:
    results = json.loads((out / "loss.json").read_text())
    write_whole(out / "loss.md", markdown(results))
    write_whole(out / "loss.png", plot(results["cases"], speeds(results)))
    if out.resolve() == RESULTS.resolve():
        before, _, rest = README.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        write_whole(README, before + BEGIN + summary(results) + END + after)


def summary(results: dict[str, Any]) -> str:
    """A row for each shape and dtype: ours beside the fastest of each kind of peer."""
    lines = ["| N, H, V | | ours | " + " | ".join(PEERS) + " |", "|---" * (3 + len(PEERS)) + "|"]
    for entry in speeds(results):
        rows = {name: row for name, row in entry["cases"].items() if "error" not in row}
        chosen = [rows["opsdl-auto"]]
        for names in PEERS.values():
            found = [rows[name] for name in names if name in rows]
            chosen.append(min(found, key=lambda row: median(row["ratios"]), default=None))
        cells = ["not installed" if row is None else _summary_cell(row) for row in chosen]
        lines.append(f"| {', '.join(map(str, entry['shape']))} | {entry['dtype']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _summary_cell(row: dict[str, Any]) -> str:
    memory = "-" if row["extra_bytes"] is None else _mib(row["extra_bytes"])
    return f"{median(row['ratios']):.2f}, {memory} MiB, {_scientific(row['hidden_error'])}"


def speeds(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured shapes and dtypes, each row with its "ratios" to the bare products, one a round."""
    chosen = [entry for entry in results["measured"].values() if "gradient_bytes" in entry]
    for entry in chosen:
        products = entry["cases"]["products"]["milliseconds"]
        for row in entry["cases"].values():
            if "error" not in row:
                row["ratios"] = [x / bar for x, bar in zip(row["milliseconds"], products, strict=True)]
    return chosen


def markdown(results: dict[str, Any]) -> str:
    sections = [_introduction(results)]
    sections += [_speed_table(entry, results["cases"]) for entry in speeds(results)]
    accuracies = [entry for entry in results["measured"].values() if "levels" in entry]
    sections.append("## Errors from KL 1 to 1e-7\n\n" + _ACCURACY)
    sections += [_accuracy_table(entry, results["cases"]) for entry in accuracies]
    return "\n\n".join(sections) + "\n"


_ACCURACY = """\
Relative errors of dHidden / dHead / mean KL against float64 on the same inputs; all tokens have the same noise. The
gradients are returned in the input dtype: rounding them to bfloat16 costs 1.7e-3 by itself."""


def _introduction(results: dict[str, Any]) -> str:
    machine = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    backends = ", ".join(f"{name} ({state})" for name, state in machine["backends"].items())
    return f"""\
# Fused reverse KL beside its peers

Forward plus backward to dHidden and dHead; one head for student and teacher, separate hidden states. The cases take
turns in one process: {results["rounds"]} rounds of two runs each, of which the second counts. Times are medians; a
ratio is the median (and range) of the ratios to the bare products of the same round. Extra memory is the peak of one
step in a process of its own, beyond the inputs, dHidden and dHead included. dH error is the relative Frobenius error of
dHidden against float64.

Machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["threads"]} threads, {machine["memory_gib"]} GiB;
{" ".join(machine["flags"]) or "no vector flags"}; {machine["date"]}.
Versions: Python {machine["python"]}, opsdl {machine["opsdl"]}, {packages}.
Loss backends of opsdl here: {backends}.

Inputs are random: logits of standard deviation 2.5, teacher noise {results["noise"]}, the same for every token, so that
there is little to skip: the rows with skip "auto" show what looking for skippable tokens costs.

![ratio and memory by case](loss.png)"""


def _speed_table(entry: dict[str, Any], cases: dict[str, Any]) -> str:
    n, h, v = entry["shape"]
    lines = [
        f"## N={n} H={h} V={v} {entry['dtype']}",
        "",
        f"dHidden + dHead: {_mib(entry['gradient_bytes'])} MiB. KL {_scientific(entry['kl'])}. {_skipped(entry)}",
        "",
        "| case | ms | x products | extra MiB | dH error |",
        "|---|---|---|---|---|",
    ]
    for name, row in entry["cases"].items():
        label = cases[name]["label"]
        if "error" in row:
            lines.append(f"| {label} | {_cell(row['error'])} | | | |")
            continue
        ratios = row["ratios"]
        error = _scientific(row["hidden_error"]) if "hidden_error" in row else "-"
        memory = "died" if row["extra_bytes"] is None else _mib(row["extra_bytes"])
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {label} | {median(row['milliseconds']):.0f} | {spread} | {memory} | {error} |")
    return "\n".join(lines)


def _accuracy_table(entry: dict[str, Any], cases: dict[str, Any]) -> str:
    levels, (n, h, v) = entry["levels"], entry["shape"]
    lines = [
        f"### {entry['dtype']}, N={n} H={h} V={v}",
        "",
        "| case | " + " | ".join(f"KL {_scientific(level['kl'])}" for level in levels) + " |",
        "|---" * (len(levels) + 1) + "|",
    ]
    for name in levels[0]["cases"]:
        cells = [_errors(level["cases"][name]) for level in levels]
        lines.append(f"| {cases[name]['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _errors(row: dict[str, Any]) -> str:
    if "error" in row:
        return _cell(row["error"])
    return " / ".join(_scientific(row[name]) for name in ("hidden", "weight", "loss"))


def _skipped(entry: dict[str, Any]) -> str:
    share = entry["skipped_tokens"]
    return "" if share is None else f'Tokens left out of the backward by skip "auto": {share:.0%}.'


def _scientific(x: float) -> str:
    """1.7e-3: errors span ten decades, in one notation they compare at a glance."""
    digits, exponent = f"{x:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}"


def _cell(text: str) -> str:
    """A message as a table cell."""
    return text.replace("|", "/")[:160]


if __name__ == "__main__":
    write_report(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
