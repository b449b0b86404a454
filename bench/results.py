"""The one form of all results: bench/results/NAME.json, from which NAME.md and the tables of the README are made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import machine_facts, versions
from bench.tables import Report, fill
from opsdl.files import write_whole

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"


@dataclass(frozen=True)
class Number:
    """One measured number.

    Attributes:
        value: The number itself; the median of `rounds` where there are any.
        unit: "ms", "s", "bytes", "nats", or "1" for shares, ratios and relative errors.
        rounds: What each counted round gave; None for what is measured once, or was kept as a median only.
    """

    value: float
    unit: str
    rounds: list[float] | None = None

    @classmethod
    def timed(cls, rounds: Sequence[float], unit: str) -> Number:
        return cls(median(rounds), unit, list(rounds))

    @classmethod
    def ratio(cls, rounds: Sequence[float], bar: Sequence[float]) -> Number:
        """The ratio to `bar`, round by round: what slows a whole round down cancels."""
        return cls.timed([x / y for x, y in zip(rounds, bar, strict=True)], "1")


@dataclass(frozen=True)
class Case:
    """One way of doing something under one set of conditions, with its numbers.

    Attributes:
        name: The case's name in the code.
        label: Its name in tables and pictures.
        of: The conditions under which it was measured, such as {"dtype": "bfloat16"}.
        numbers: Name -> number; empty where the case could not run.
        missing: Why there are no numbers.
    """

    name: str
    label: str
    of: dict[str, Any]
    numbers: dict[str, Number]
    missing: str | None = None

    def value(self, number: str) -> float | None:
        found = self.numbers.get(number)
        return None if found is None else found.value

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Case:
        numbers = {name: Number(**number) for name, number in fields["numbers"].items()}
        return cls(**{**fields, "numbers": numbers})


@dataclass(frozen=True)
class Result:
    """All that one command measured. `machine` and `versions` hold what was recorded, `settings` what was chosen."""

    name: str
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    cases: list[Case]
    schema: int = SCHEMA

    def select(self, name: str | None = None, /, **conditions: Any) -> list[Case]:
        """The cases of that name (any name if None) whose `of` holds all the conditions, in the order measured."""
        wanted = conditions.items()
        return [case for case in self.cases if name in (None, case.name) and wanted <= case.of.items()]

    def only(self, name: str, /, **conditions: Any) -> Case:
        (case,) = self.select(name, **conditions)
        return case

    def distinct(self, *keys: str, **conditions: Any) -> list[tuple[Any, ...]]:
        """The distinct values of these conditions, in the order measured; cases without one of them do not count."""
        chosen = (case.of for case in self.select(**conditions) if set(keys) <= case.of.keys())
        return list(dict.fromkeys(tuple(of[key] for key in keys) for of in chosen))


def measured(name: str, command: str, settings: dict[str, Any], cases: list[Case]) -> Result:
    """A result of today, on this machine."""
    return Result(name, command, date.today().isoformat(), machine_facts(), versions(), settings, cases)


def load(path: Path) -> Result:
    """Read a result. Raises ValueError on another schema than this code writes."""
    fields = json.loads(path.read_text())
    if fields["schema"] != SCHEMA:
        raise ValueError(f"{path}: schema {fields['schema']}; expected {SCHEMA}")
    return Result(**{**fields, "cases": [Case.read(case) for case in fields["cases"]]})


def save(result: Result, path: Path) -> None:
    write_whole(path, json.dumps(asdict(result), indent=1) + "\n")


def publish(result: Result, report: Report, out: Path) -> None:
    """Write NAME.json and what is made from it into `out`; from the committed results, the README's tables too."""
    out.mkdir(parents=True, exist_ok=True)
    save(result, out / f"{result.name}.json")
    write_report(result.name, report, out)
    print(f"written: {out / result.name}.md, with {result.name}.json beside it")


def write_report(name: str, report: Report, out: Path) -> None:
    write_whole(out / f"{name}.md", report.markdown)
    for file, draw in report.images.items():
        write_whole(out / file, draw())
    if out.resolve() == RESULTS.resolve():
        write_whole(README, fill(README.read_text(), report.tables))


def origin(result: Result) -> str:
    """Lines that say how, when and where a result came to be."""
    machine, sentences = result.machine, [f"Measured on {result.date} by `{result.command}`."]
    if "cpu" in machine:
        flags = " ".join(machine["flags"]) or "no vector flags"
        sentences.append(f"Machine: {machine['cpu']} ({flags}), {machine['cores']} cores, {machine['memory_gib']} GiB.")
    else:
        sentences.append("Of this run the medians were kept, and neither the single rounds nor the machine.")
    if machine.get("gpu"):
        sentences.append(f"GPU: {machine['gpu']}.")
    sentences.append(f"Threads: {machine['threads']}.")
    if result.versions:
        sentences.append("Versions: " + ", ".join(f"{name} {text}" for name, text in result.versions.items()) + ".")
    if "backends" in machine:
        states = ", ".join(f"{name} ({state})" for name, state in machine["backends"].items())
        sentences.append(f"Loss backends of opsdl: {states}.")
    return "\n".join(sentences)
