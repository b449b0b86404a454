"""The picture: time against the bare products, and memory against the size of the gradients, by case."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.results import Case, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Okabe-Ito blue and vermilion, apart for every kind of colour vision; filled and hollow as well.
DTYPES = {"bfloat16": ("#0072B2", True, -0.16), "float32": ("#D55E00", False, 0.16)}
MARKERS = "osD^v"
Group = tuple[tuple[int, int, int], str]  # (N, H, V), dtype


def plot(result: Result) -> bytes:
    """A PNG of two panels: a line per reverse-KL case, a mark per shape and dtype."""
    import matplotlib  # only a picture needs these, and they are slow to import
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    from opsdl.evaluation.report.plots import STYLE

    groups: list[Group] = [
        ((n, h, v), dtype) for n, h, v, dtype in result.distinct("N", "H", "V", "dtype", what="speed")
    ]
    labels = {case.name: case.label for case in result.select(what="speed", kind="reverse KL")}
    shapes = list(dict.fromkeys(shape for shape, _ in groups))
    style: Any = {**STYLE, "axes.grid.axis": "both"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(14, 1.6 + 0.55 * len(labels)), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, value_of in ((left, lambda case: case.value("ratio")), (right, _memory_of(result))):
            for group in groups:
                _mark(axes, _points(result, group, list(labels), value_of), group, shapes)
            _dress(axes)
        left.set_title("Time, as a multiple of the four bare products")
        right.set_title("Peak extra memory, as a multiple of dHidden + dHead")
        left.set_yticks(range(len(labels)), list(labels.values()))
        left.invert_yaxis()
        for name, label in zip(labels, left.get_yticklabels(), strict=True):
            label.set_fontweight("bold" if name.startswith("opsdl") else "normal")
        handles = [_mark(left, [], group, shapes) for group in groups]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(shapes))
        image = io.BytesIO()
        figure.savefig(image, format="png")
    return image.getvalue()


def _memory_of(result: Result) -> Callable[[Case], float | None]:
    def value_of(case: Case) -> float | None:
        of = {key: case.of[key] for key in ("what", "N", "H", "V", "dtype")}
        gradients = result.only("inputs", **of).numbers["gradients"].value
        memory = case.value("memory")
        return None if memory is None else memory / gradients

    return value_of


def _points(
    result: Result, group: Group, names: list[str], value_of: Callable[[Case], float | None]
) -> list[tuple[float, float]]:
    (n, h, v), dtype = group
    cases = result.select(what="speed", kind="reverse KL", N=n, H=h, V=v, dtype=dtype)
    found = [(value_of(case), names.index(case.name) + DTYPES[dtype][2]) for case in cases]
    return [(value, y) for value, y in found if value is not None]


def _dress(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator

    from opsdl.evaluation.report.plots import INK

    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)  # the floor of an exact form
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 2))
    axes.tick_params(axis="y", length=0)


def _mark(axes: Axes, points: list[tuple[float, float]], group: Group, shapes: list[tuple[int, int, int]]) -> Line2D:
    """Colour for the dtype, form for the shape. Returns the artist, for the legend."""
    shape, dtype = group
    color, filled, _ = DTYPES[dtype]
    n, h, v = shape
    (artist,) = axes.plot(
        [x for x, _ in points], [y for _, y in points], linestyle="", markersize=8,
        marker=MARKERS[shapes.index(shape) % len(MARKERS)],
        markeredgecolor=color, markeredgewidth=1.6, markerfacecolor=color if filled else "white",
        label=f"{dtype}, N={n} H={h} V={v}",
    )  # fmt: skip
    return artist
