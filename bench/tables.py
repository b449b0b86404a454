"""Tables in Markdown with one value a cell, and their places in the README."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

END = "<!-- end -->"


@dataclass(frozen=True)
class Table:
    """A header and rows of cells; every cell holds one value."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        assert all(len(line) == len(self.header) for line in lines), "a row of another length than the header"
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Report:
    """What is made from one result: NAME.md, tables that the README may show by name, images by file name.

    Images are functions that draw them, so that nothing is drawn where only tables are wanted.
    """

    markdown: str
    tables: Mapping[str, Table]
    images: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)


def fill(text: str, tables: Mapping[str, Table]) -> str:
    """Put each table between `<!-- table: NAME -->` and `<!-- end -->`, where `text` has these markers.

    Raises ValueError when a table has a beginning and no end.
    """
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- table: {name} -->\n")
        if begin:
            _, end, after = rest.partition(END)
            if not end:
                raise ValueError(f"table {name}: no {END} after its beginning")
            text = f"{before}{begin}{table.markdown()}\n{end}{after}"
    return text


def names(text: str) -> list[str]:
    """The names of the tables that `text` has markers for."""
    return re.findall(r"<!-- table: (\S+) -->", text)


def fixed(x: float | None, digits: int = 2) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def percent(x: float | None, digits: int = 1) -> str:
    return "-" if x is None else f"{x:.{digits}%}"


def mib(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def scientific(x: float | None) -> str:
    """1.7e-3: errors span ten decades, in one notation they compare at a glance."""
    if x is None:
        return "-"
    digits, exponent = f"{x:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def message(text: str) -> str:
    """An error message as a cell."""
    return text.replace("|", "/")[:160]
