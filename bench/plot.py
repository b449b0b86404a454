"""The picture: time against the bare products, and memory against the size of the gradients, by case."""

from __future__ import annotations

import io
from statistics import median
from typing import TYPE_CHECKING, Any

from opsdl.evaluation.report.plots import INK, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe-Ito blue and vermilion, apart for every kind of colour vision; filled and hollow as well.
DTYPES = {"bfloat16": ("#0072B2", True, -0.16), "float32": ("#D55E00", False, 0.16)}
MARKERS = "osD^v"


def plot(cases: dict[str, Any], entries: list[dict[str, Any]]) -> bytes:
    """A PNG of two panels: a line per reverse-KL case, a mark per shape and dtype. `entries` as in report.speeds."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    names = [name for name, case in cases.items() if case["kind"] == "reverse KL"]
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "both"}):
        figure = Figure(figsize=(14, 1.6 + 0.55 * len(names)), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, names, entries, lambda row, entry: median(row["ratios"]))
        left.set_title("Time, as a multiple of the four bare products")
        _panel(right, names, entries, _memory)
        right.set_title("Peak extra memory, as a multiple of dHidden + dHead")
        left.set_yticks(range(len(names)), [cases[name]["label"] for name in names])
        left.invert_yaxis()
        for axes in (left, right):
            axes.tick_params(axis="y", length=0)
        for name, label in zip(names, left.get_yticklabels(), strict=True):
            label.set_fontweight("bold" if name.startswith("opsdl") else "normal")
        handles = [_mark(left, [], [], entry, _shapes(entries)) for entry in entries]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(_shapes(entries)))
        image = io.BytesIO()
        figure.savefig(image, format="png")
    return image.getvalue()


def _memory(row: dict[str, Any], entry: dict[str, Any]) -> float | None:
    return None if row["extra_bytes"] is None else row["extra_bytes"] / entry["gradient_bytes"]


def _panel(axes: Axes, names: list[str], entries: list[dict[str, Any]], value_of) -> None:
    for entry in entries:
        points = []
        for y, name in enumerate(names):
            row = entry["cases"][name]
            value = None if "error" in row else value_of(row, entry)
            if value is not None:
                points.append((value, y + DTYPES[entry["dtype"]][2]))
        _mark(axes, [x for x, _ in points], [y for _, y in points], entry, _shapes(entries))
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)  # the floor of an exact form
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(_ticks())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 2))


def _ticks():
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))


def _shapes(entries: list[dict[str, Any]]) -> list[list[int]]:
    shapes: list[list[int]] = []
    for entry in entries:
        if entry["shape"] not in shapes:
            shapes.append(entry["shape"])
    return shapes


def _mark(axes: Axes, xs, ys, entry: dict[str, Any], shapes: list[list[int]]):
    """Colour for the dtype, form for the shape. Returns the artist, for the legend."""
    color, filled, _ = DTYPES[entry["dtype"]]
    n, h, v = entry["shape"]
    (artist,) = axes.plot(
        xs, ys, linestyle="", marker=MARKERS[shapes.index(entry["shape"]) % len(MARKERS)], markersize=8,
        markeredgecolor=color, markeredgewidth=1.6, markerfacecolor=color if filled else "white",
        label=f"{entry['dtype']}, N={n} H={h} V={v}",
    )  # fmt: skip
    return artist
