"""The report's plots, as SVG that is part of the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from meancache_trt.calibration.evaluation import (
    EdgeCostMap,
    Evaluation,
    MetricName,
    ReferenceName,
    Row,
)
from meancache_trt.evaluate.marks import INK, LINE, MUTED, SURFACE, Mark, for_page, marks_of

Array = NDArray[np.float64]

BANDS = 5
"""More methods than that have no bands but for the compared one: they would hide each other."""

_SMALLEST = 1e-6
"""What a log axis shows of 0."""

SIZE = (4.0, 3.1)
WIDE = 5.4
"""Inches of 72 points, for three and for two plots a row of the page. At a page of 400 pixels
letters of 11 points are 9 or more."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters, in the page's font
    "text.parse_math": False,  # names are names
    "svg.hashsalt": "meancache-trt",  # the same evaluation gives the same page
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}

_PLAIN = FuncFormatter(lambda value, _: np.format_float_positional(value, 6, trim="-"))
"""Numbers of a log axis; powers in matplotlib's own markup would show as such."""

LABELS: dict[MetricName, str] = {
    "psnr": "PSNR, dB",
    "ssim": "1 − SSIM",
    "latent_error": "latent error",
}


@dataclass(frozen=True)
class Plot:
    """A drawing and what it shows, in words."""

    title: str
    svg: str
    description: str


def _draw(
    name: str,
    draw: Callable[[Axes], None],
    size: tuple[float, float] = SIZE,
) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return for_page(buffer.getvalue(), name)


@dataclass(frozen=True)
class _View:
    """A metric against a reference."""

    reference: ReferenceName
    metric: MetricName

    def points(self, rows: Sequence[Row]) -> tuple[list[int], Array, Array]:
        """Budget, mean and 5th percentile of rows; on a log axis nothing is 0."""
        found = [
            (row, comparison) for row in rows if (comparison := row.comparison(self.reference))
        ]
        summaries = [comparison.metric(self.metric).summary for _, comparison in found]
        mean, p5 = ([getattr(summary, name) for summary in summaries] for name in ("mean", "p5"))
        return [row.budget for row, _ in found], self.shown(mean), self.shown(p5)

    def shown(self, values: Sequence[float]) -> Array:
        """Values as they are drawn: of SSIM what is missing to 1, so that a log axis fits."""
        drawn = 1 - np.array(values) if self.metric == "ssim" else np.array(values)
        return drawn if self.metric == "psnr" else np.maximum(drawn, _SMALLEST)


def pareto(evaluation: Evaluation, reference: ReferenceName, metric: MetricName) -> Plot:
    """A metric over the budget, with the 5th percentile as a band.

    Not over time: each method costs the same time an evaluation, but for what is measured wrongly.
    """
    view, marks = _View(reference, metric), marks_of(evaluation)

    def draw(axes: Axes) -> None:
        for method, mark in marks.items():
            rows = [row for row in evaluation.rows if row.method == method]
            is_banded = method == evaluation.against or len(marks) <= BANDS
            _curve(axes, *view.points(rows), mark, is_banded=is_banded)
        _level(axes, evaluation, view)
        if metric != "psnr":
            _make_logarithmic(axes)
        axes.set_xticks(evaluation.budgets, [str(budget) for budget in evaluation.budgets])
        axes.set_xlabel("network evaluations")

    name = LABELS[metric].partition(",")[0]
    return Plot(
        title=LABELS[metric][0].upper() + LABELS[metric][1:],
        svg=_draw(f"pareto-{reference}-{metric}", draw),
        description=f"{name} of each method over its evaluations; the numbers are in the tables",
    )


def _make_logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    is_short = high < 50 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_short else (1,)))
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curve(
    axes: Axes, x: list[int], mean: Array, p5: Array, mark: Mark, *, is_banded: bool
) -> None:
    colour = mark.colour
    if is_banded:
        axes.fill_between(x, p5, mean, color=colour, alpha=0.10, linewidth=0)
        axes.plot(x, p5, color=colour, linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.8)
    axes.plot(x, mean, color=colour, marker=mark.marker, markeredgecolor=SURFACE)


def _level(axes: Axes, evaluation: Evaluation, view: _View) -> None:
    """A line where no method can be told from the model itself."""
    row, text = (
        (evaluation.noise_floor, "noise floor")
        if view.reference == "own"
        else (evaluation.full, f"the model's own {evaluation.setup.steps} steps")
    )
    comparison = row.comparison(view.reference) if row else None
    if comparison is None:
        return
    (level,) = view.shown([comparison.metric(view.metric).summary.mean])
    axes.axhline(level, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    axes.annotate(
        text,
        (0, level),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=10,
        color=MUTED,
    )


def timeline(evaluation: Evaluation, budget: int) -> Plot:
    """Where on the σ axis each method evaluates the network, at one budget."""
    rows = [row for row in evaluation.rows if row.budget == budget]
    marks = marks_of(evaluation)

    def draw(axes: Axes) -> None:
        for place, row in enumerate(rows):
            mark, sigmas = marks[row.method], row.schedule.sigmas
            axes.plot([sigmas[0], 0], [place, place], color=LINE, linewidth=1)
            axes.plot(
                sigmas,
                [place] * len(sigmas),
                linestyle="none",
                marker=mark.marker,
                color=mark.colour,
                markeredgecolor=SURFACE,
                markeredgewidth=0.6,
            )
        axes.set_yticks(range(len(rows)), [row.method for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlim(1.02, -0.02)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("σ, from noise to picture")
        axes.spines["left"].set_visible(False)

    listed = "; ".join(f"{row.method} at steps {_numbers(row.schedule.nodes)}" for row in rows)
    return Plot(
        title=f"{budget} evaluations",
        svg=_draw(f"timeline-{budget}", draw, (WIDE, 0.75 + 0.3 * len(rows))),
        description=f"Nodes on the σ axis: {listed}",
    )


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def heat_map(costs: EdgeCostMap, row: Row | None) -> Plot:
    """Edge costs from step to step, with the edges that a schedule takes."""
    mean = np.array([[np.nan if c is None else c for c in line] for line in costs.mean])
    positive = mean[mean > 0]
    low = float(np.quantile(positive, 0.02)) if positive.size else 1e-6
    high = float(positive.max()) if positive.size else 1.0

    def draw(axes: Axes) -> None:
        image = axes.imshow(
            np.where(mean > 0, mean, np.where(np.isnan(mean), np.nan, low)),
            norm=LogNorm(low, max(high, low * 1.01)),
            cmap="viridis",
            interpolation="nearest",
            origin="upper",
        )
        if row is not None:
            nodes = [*row.schedule.nodes, len(mean)]
            axes.plot(
                nodes[1:], nodes[:-1], "o", color="white", markeredgecolor="black", markersize=5
            )
        axes.grid(visible=False)
        axes.set_xlabel("to step")
        axes.set_ylabel("from step")
        bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, format=_PLAIN)
        bar.outline.set_visible(False)

    taken = f"; the dots are the edges of {row.method} at {row.budget}" if row else ""
    return Plot(
        title="Edge costs",
        svg=_draw("edge-costs", draw, (WIDE, 4.4)),
        description=f"Mean cost of jumping from one step to another{taken}",
    )


def scatter(evaluation: Evaluation, budget: int, reference: ReferenceName) -> Plot | None:
    """Each picture's PSNR by the compared method, against that by every other one."""
    base = evaluation.row(evaluation.against, budget)
    comparison = base.comparison(reference) if base else None
    others = [
        row for row in evaluation.rows if row.budget == budget and row.method != evaluation.against
    ]
    if comparison is None or not others:
        return None
    x, marks = np.array(comparison.psnr.values), marks_of(evaluation)

    def draw(axes: Axes) -> None:
        found = [row.comparison(reference) for row in others]
        every = [x, *(np.array(other.psnr.values) for other in found if other)]
        low, high = min(map(np.min, every)) - 1, max(map(np.max, every)) + 1
        axes.fill_between([low, high], [low, high], low, color=LINE, alpha=0.35, linewidth=0)
        axes.plot([low, high], [low, high], color=MUTED, linewidth=1)
        for row, values in zip(others, every[1:], strict=True):
            mark = marks[row.method]
            axes.plot(
                x,
                values,
                linestyle="none",
                marker=mark.marker,
                color=mark.colour,
                alpha=0.75,
                markersize=5,
                markeredgewidth=0,
            )
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_aspect("equal")
        axes.set_xlabel(f"{evaluation.against}, dB")
        axes.set_ylabel("other methods, dB")

    return Plot(
        title=f"{budget} evaluations",
        svg=_draw(f"scatter-{budget}", draw, (SIZE[0], SIZE[0])),
        description=f"PSNR of each picture: {evaluation.against} on the x axis, other methods on "
        f"the y axis; below the diagonal {evaluation.against} is better",
    )
