"""Make NAME.md, the pictures and the README's tables again from what was measured; nothing is measured.

python -m bench.report
"""

from __future__ import annotations

from collections.abc import Callable

from bench import attention, loss_dtype, loss_report, prefix_report, skipping, training
from bench.results import README, RESULTS, Result, load, write_report
from bench.tables import Report, Table, fill
from opsdl.files import write_whole

REPORTS: dict[str, Callable[[Result], Report]] = {
    "loss": loss_report.report,
    "attention": attention.report,
    "prefix": prefix_report.report,
    "skipping": skipping.report,
    "loss_dtype": loss_dtype.report,
}


def reports() -> dict[str, Report]:
    """The report of every committed result."""
    return {name: make(load(RESULTS / f"{name}.json")) for name, make in REPORTS.items()}


def readme_tables(made: dict[str, Report]) -> dict[str, Table]:
    """All tables that the README may show, by the names of its markers."""
    found = training.tables()
    for report in made.values():
        found.update(report.tables)
    return found


def main() -> None:
    made = reports()
    for name, report in made.items():
        write_report(name, report, RESULTS)
    write_whole(README, fill(README.read_text(), readme_tables(made)))


if __name__ == "__main__":
    main()
