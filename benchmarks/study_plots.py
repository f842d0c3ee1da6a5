"""The plots of docs/results.md: numbers in, SVG out."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_numbers import Budget, Measure, Study, t_interval

from camopd.evaluation.charts import COLOURS, INK, NO_METADATA, STYLE

CURVES = ("mopd", "mopd-3to1", "alternating", "alternating-scaled", "selection", "camopd")
PAGE = STYLE | {"figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white"}


def plots(study: Study) -> dict[str, str]:
    """Name -> SVG: for each group the seeds as points, and for each signal the shares against both budgets."""
    found = {}
    with matplotlib.rc_context(PAGE):
        for group in ("sampled", "topk"):
            if study.keys(group):
                panels: list[tuple[str, Budget, str]] = [
                    ("recovered share, equal rollouts", "rollouts", "recovered"),
                    ("recovered share, equal backward tokens", "tokens", "recovered"),
                    ("retained share, equal rollouts", "rollouts", "retained"),
                ]
                found[group] = strips(study, study.keys(group), panels)
                found[f"{group}-budget"] = curves(study, group)
        if study.bases("options"):
            rows = []
            for base in study.bases("options"):
                rows += [base, *(key for key in study.keys("options") if study.variants[key].base == base)]
            panels = [
                ("recovered share, equal rollouts", "rollouts", "recovered"),
                ("accuracy on unseen kinds", "rollouts", "unseen"),
                ("retained share, equal rollouts", "rollouts", "retained"),
            ]
            found["options"] = strips(study, rows, panels)
    return found


def strips(study: Study, keys: Sequence[str], panels: Sequence[tuple[str, Budget, str]]) -> str:
    """A row a variant, a panel a measure: each seed a point, the mean a bar's middle, its 95 % interval the bar."""
    figure = Figure(figsize=(10.5, 0.9 + 0.34 * len(keys)), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True)
    if panels[0][2] == panels[1][2]:
        grid[1].sharex(grid[0])
    for axes, colour, (title, budget, what) in zip(grid, COLOURS, panels, strict=False):
        for row, key in enumerate(keys):
            values = [getattr(measure, what) for measure in study.measures(key, budget).values()]
            if values:
                _strip(axes, row, values, colour)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.margins(x=0.06)
    mixed = len({key.partition("/")[0] for key in keys}) > 1  # baselines and their options
    names = [
        f"{name} ({group})" if mixed and group != "options" else name for group, _, name in (k.partition("/") for k in keys)
    ]
    axes.set_yticks(range(len(keys)), names)
    axes.set_ylim(len(keys) - 0.4, -0.6)
    return _svg(figure)


def _strip(axes: Axes, row: int, values: Sequence[float], colour: str) -> None:
    interval = t_interval(values)
    axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=5, alpha=0.25, solid_capstyle="round")
    axes.plot(values, [row] * len(values), "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0)
    axes.plot([interval.mean], [row], "|", color=colour, markersize=13, markeredgewidth=2)


def curves(study: Study, group: str) -> str:
    """Recovered share against rollouts and against backward tokens: a line through the seeds' means, each seed a point."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    keys = [key for key in study.keys(group) if study.variants[key].name in CURVES]
    left, right = figure.subplots(1, 2, sharey=True)
    for colour, key in zip(COLOURS, keys, strict=False):
        points = stages(study, key)
        for axes, cost in ((left, "updates"), (right, "tokens")):
            means = sorted(
                (statistics.fmean(getattr(m, cost) for m in p), statistics.fmean(m.recovered for m in p)) for p in points
            )
            axes.plot(*zip(*means, strict=True), color=colour, marker="o", markersize=6, label=study.variants[key].name)
            every = [(getattr(measure, cost), measure.recovered) for part in points for measure in part]
            axes.plot(*zip(*every, strict=True), "o", color=colour, markersize=3, alpha=0.35, markeredgewidth=0)
    left.set_xlabel(f"updates of {study.size.prompts_per_step} rollouts")
    right.set_xlabel("backward tokens")
    right.xaxis.set_major_formatter("{x:,.0f}")
    left.set_ylabel("recovered share")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    return _svg(figure)


def stages(study: Study, key: str) -> list[list[Measure]]:
    """The seeds' measures at half of the rollouts, at all of them, and at the token budget."""
    half = study.size.num_rounds // 2
    runs = [study.runs[key, seed] for seed in study.seeds if (key, seed) in study.runs]
    at_half = [study.at(run, half) for run in runs if half in run.scores]
    parts = [at_half, *(list(study.measures(key, budget).values()) for budget in ("rollouts", "tokens"))]
    return [part for part in parts if part]


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=NO_METADATA)
    return text.getvalue()
