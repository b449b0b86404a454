"""The picture of a run: KL and rollout accuracy over steps, accuracy before and after for every evaluation set."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opsdl.evaluation.results import EvaluationResult, SetResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER, SHORT_BEFORE, SHORT_AFTER, INK = "#9aa5b1", "#1f6feb", "#e3d9c6", "#c8973f", "#24292f"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e5e8eb",
    "legend.frameon": False,
}


def plot_report(
    before: EvaluationResult, after: EvaluationResult, metrics: Sequence[dict[str, Any]], title: str
) -> bytes:
    """Plot the three panels as a PNG, 1800 pixels wide.

    Args:
        before: the evaluation with the weights before training.
        after: the same items with the weights after it.
        metrics: a row for each step, with at least "step", "kl" and "accuracy".
        title: stands above the panels.
    """
    import matplotlib  # only a report needs it, and it is slow to import
    from matplotlib.figure import Figure  # without pyplot: no global state, no display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 5), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
        axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
        _curve(axes[0], metrics, "kl", "KL to the teacher (nats per token)")
        _curve(axes[1], metrics, "accuracy", "Accuracy of the rollouts")
        axes[1].set_ylim(0, 1.03)
        axes[1].yaxis.set_major_formatter("{x:.0%}")
        _bars(axes[2], before.sets, after.sets)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13)
        image = io.BytesIO()
        figure.savefig(image, format="png")
    return image.getvalue()


def _curve(axes: Axes, metrics: Sequence[dict[str, Any]], key: str, title: str) -> None:
    """Draw one value a step, faint, under its running mean. Steps without the value are left out."""
    from matplotlib.ticker import MaxNLocator

    points = [(row["step"], row[key]) for row in metrics if row[key] is not None]
    axes.set_title(title)
    axes.set_xlabel("step")
    if not points:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center")
        return
    steps, values = zip(*points, strict=True)
    window = max(4, len(values) // 8)
    trail = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    axes.plot(steps, values, color=BEFORE, marker="o", markersize=3, linewidth=1, alpha=0.7, label="step")
    axes.plot(
        steps, [sum(part) / len(part) for part in trail], color=AFTER, linewidth=2.2, label=f"mean of the last {window}"
    )
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.legend()


def _bars(axes: Axes, before: Sequence[SetResult], after: Sequence[SetResult]) -> None:
    series = (
        ("long context, before", [chosen.long for chosen in before], BEFORE),
        ("long context, after", [chosen.long for chosen in after], AFTER),
        ("short context, before", [chosen.short for chosen in before], SHORT_BEFORE),
        ("short context, after", [chosen.short for chosen in after], SHORT_AFTER),
    )
    width = 0.2
    for offset, (label, accuracies, color) in zip((-1.6, -0.6, 0.6, 1.6), series, strict=True):
        positions = [index + offset * width for index in range(len(accuracies))]
        means = [accuracy.mean for accuracy in accuracies]
        below = [accuracy.mean - accuracy.low for accuracy in accuracies]
        above = [accuracy.high - accuracy.mean for accuracy in accuracies]
        error = {"ecolor": INK, "elinewidth": 1, "capsize": 3}
        axes.bar(positions, means, width, color=color, label=label, yerr=(below, above), error_kw=error)
        for x, mean, up in zip(positions, means, above, strict=True):
            axes.text(x, mean + up + 0.015, f"{mean:.0%}", ha="center", va="bottom", fontsize=8, fontweight="bold")
    axes.set_title("Accuracy on the evaluation sets, 95 % intervals")
    labels = [f"{chosen.name}\n{chosen.length} tokens, {len(chosen.samples)} items" for chosen in before]
    axes.set_xticks(range(len(before)), labels)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.3)  # the legend stands above the tallest bar
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(ncols=2, loc="upper center")
