"""What the page says about gradients: ``camopd.diagnostics`` as series, and as a table with how to read it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from camopd.evaluation.charts import Point

Step = Mapping[str, Any]
COSINE = r"gradient/cosine_(.+)"


@dataclass(frozen=True)
class Measure:
    """One measure of the table.

    Attributes:
        title: what it is called.
        pattern: the names of its numbers; the group is the branch or the pair of branches that they are about.
        form: how a value looks.
        reading: how to read it, in one sentence.
    """

    title: str
    pattern: str
    form: str
    reading: str


MEASURES = (
    Measure(
        "Cosine",
        COSINE,
        "{:+.3f}",
        "Below 0 the branches undo each other's steps, at 0 they do not meet, above 0 they help each other.",
    ),
    Measure(
        "Dot product",
        r"gradient/dot_(.+)",
        "{:+.2e}",
        "The cosine times both lengths: how much a small step for one branch lowers the loss of the other.",
    ),
    Measure(
        "Coherence, all",
        r"(.+)/coherence_all",
        "{:.3f}",
        "Length of the samples' summed gradient over the sum of their lengths: 1 where all pull one way, 0 where they cancel.",
    ),
    Measure(
        "Coherence, selected",
        r"(.+)/coherence_selected",
        "{:.3f}",
        "The same of the selected samples alone; fewer samples agree more by chance: N unrelated ones reach 1/√N.",
    ),
    Measure(
        "GCG",
        r"(.+)/gcg",
        "{:+.1f} %",
        "Gradient coherence gain: how much more coherent the selected samples are than all, in part because they are fewer.",
    ),
    Measure(
        "Pair cosine, all",
        r"(.+)/pair_cosine_all",
        "{:+.3f}",
        "The mean cosine of two samples, weighted by length: 0 for unrelated ones, however many there are.",
    ),
    Measure(
        "Pair cosine, selected",
        r"(.+)/pair_cosine_selected",
        "{:+.3f}",
        "Above that of all samples only where selection finds samples that agree more.",
    ),
)
TOKEN_SHARE = Measure(
    "Token share",
    "",
    "{:.3f}",
    "Of all tokens trained on so far, the part that came from the branch; the last value is the run's.",
)


def diagnostic_series(steps: Iterable[Step], pattern: str) -> dict[str, list[Point]]:
    """Branch or pair -> one diagnostic over the optimiser steps that have it."""
    series: dict[str, list[Point]] = {}
    for step in steps:
        for name, value in step.get("diagnostics", {}).items():
            if match := re.fullmatch(pattern, name):
                series.setdefault(match[1].replace("_", " and "), []).append(Point(step["step"], value))
    return series


def token_shares(steps: Iterable[Step], names: Sequence[str]) -> dict[str, list[Point]]:
    """Branch -> its share of all tokens trained on up to each step (Open-MOPD's token budget, arXiv:2608.19098)."""
    series: dict[str, list[Point]] = {name: [] for name in names}
    tokens = dict.fromkeys(names, 0)
    for step in steps:
        for name, numbers in step["branches"].items():
            tokens[name] += numbers.get("tokens", 0)
        if total := sum(tokens.values()):
            for name, own in series.items():
                own.append(Point(step["step"], tokens[name] / total))
    return series


def gradient_table(steps: Sequence[Step], names: Sequence[str]) -> list[dict[str, Any]]:
    """The measures with a line a branch or pair: first, last and mean value. Empty for a run without diagnostics."""
    measured = [(measure, diagnostic_series(steps, measure.pattern)) for measure in MEASURES]
    if not any(series for _, series in measured):
        return []
    return [
        {"measure": measure, "lines": [_line(measure, whose, points) for whose, points in series.items()]}
        for measure, series in [*measured, (TOKEN_SHARE, token_shares(steps, names))]
        if series
    ]


def taken_on(steps: Iterable[Step]) -> str:
    """What the gradients were taken on: ``all parameters``, or the names of blocks."""
    return next((step["diagnostics"]["parameters"] for step in steps if "diagnostics" in step), "")


def _line(measure: Measure, whose: str, points: Sequence[Point]) -> dict[str, str]:
    values = [point.y for point in points]
    shown = {"first": values[0], "last": values[-1], "mean": sum(values) / len(values)}
    return {"whose": whose} | {name: measure.form.format(value) for name, value in shown.items()}
