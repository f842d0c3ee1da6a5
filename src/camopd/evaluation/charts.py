"""The report's charts: numbers in, inline SVG out. The only file that imports matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

COLOURS = ("#1d4ed8", "#c2410c", "#0f766e", "#7e22ce", "#a16207", "#be185d")  # told apart with any colour vision, and in grey
INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font, can be searched and read aloud
    "svg.hashsalt": "camopd",  # the same numbers give the same bytes
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Point:
    """One mark: its place and, where known, the ends of its 95 % interval."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour a branch, the same in all charts."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def lines(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: Mapping[str, float] | None = None,
    whole_x: bool = True,
    bottom: float | None = 0.0,
) -> str:
    """One line a branch, with bars where intervals are known.

    Args:
        series: branch -> its points, in the order of x; branches without points are left out.
        title: what the chart shows; with the first and the last value of each line it is the text for those who cannot see it.
        x_label: name and unit of the horizontal axis.
        y_label: name and unit of the vertical axis.
        marks: branch -> height of a dashed line in the branch's colour: its teacher.
        whole_x: the horizontal axis counts something.
        bottom: where the vertical axis starts; None lets the data say and draws a line at zero.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(5.4, 2.9)
        for name, colour in colours(list(series)).items():
            points = series[name]
            if points:
                _line(axes, points, label=name, colour=colour)
            if marks and name in marks:
                axes.axhline(marks[name], color=colour, linestyle=(0, (4, 3)), linewidth=1.2, label=f"{name} teacher")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_ylim(bottom=bottom)
        if bottom is None:
            axes.axhline(0, color=MUTED, linewidth=1)
        if whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=1.4, handlelength=1.6)
        spoken = [f"{name} from {p[0].y:.3g} at {p[0].x:g} to {p[-1].y:.3g} at {p[-1].x:g}" for name, p in series.items() if p]
        return _svg(figure, f"{title}, by {x_label}: {'; '.join(spoken)}.")


def dots(panels: Mapping[str, Mapping[str, Point]], *, title: str, x_label: str) -> str:
    """Scores as dots with their intervals: a panel a branch, a row a model, the last row the one that matters.

    Args:
        panels: branch -> model -> its score as ``x``; y is ignored. The same models in every panel.
        title: for those who cannot see it.
        x_label: what is scored.
    """
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        rows = list(next(iter(panels.values())))
        figure, _ = _figure(9.6, 0.75 + 0.42 * len(rows), axes=False)
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        spoken = []
        for axes, (name, colour) in zip(grid, colours(list(panels)).items(), strict=True):
            for row, model in enumerate(rows):
                point, strong = panels[name][model], row == len(rows) - 1
                tone = colour if strong else MUTED
                if point.low is not None and point.high is not None:
                    axes.plot(
                        [point.low, point.high], [row, row], color=tone, linewidth=2.6, solid_capstyle="round", alpha=0.45
                    )
                axes.plot([point.x], [row], "o", color=tone, markersize=8 if strong else 6.5)
                axes.annotate(
                    f"{point.x:.3f}", (point.x, row), (0, 7), textcoords="offset points", ha="center", color=tone, fontsize=9
                )
                spoken.append(f"{name}, {model}: {point.x:.3f}")
            axes.set_title(name, loc="left", color=colour, fontweight="bold", fontsize=10.5)
            axes.set_xlabel(x_label)
            axes.set_yticks(range(len(rows)), rows)
            axes.set_ylim(len(rows) - 0.4, -0.75)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.spines["left"].set_visible(False)
            highest = max((p.high if p.high is not None else p.x) for p in panels[name].values())
            axes.set_xlim(-0.07 * max(highest, 1.0), 1.07 * max(highest, 1.0))
        return _svg(figure, f"{title}. {'; '.join(spoken)}.")


def _figure(width: float, height: float, *, axes: bool = True) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.08))
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    return figure, figure.subplots() if axes else None


def _line(axes: Any, points: Sequence[Point], *, label: str, colour: str) -> None:
    x, y = [p.x for p in points], [p.y for p in points]
    marker = "o" if len(points) <= 24 else ""
    axes.plot(x, y, color=colour, marker=marker, label=label)
    bounded = [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    if bounded:
        at, low, high = zip(*bounded, strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)


def _svg(figure: Figure, description: str) -> str:
    """The figure as an ``<svg>`` element that scales with the page and says what it shows."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=NO_METADATA)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description, quote=True)}" ', 1)
