"""The report: one self-contained page, readable offline and on paper, about what was won and what was kept.

``read_rounds`` collects what the stages left in the store; ``render`` is pure. Everything that a model or a user wrote is
escaped by the template engine, and the page's own policy forbids it to run or load anything.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from camopd import __version__
from camopd import plan as layout
from camopd.evaluation.charts import Point, colours, dots, lines
from camopd.evaluation.gradients import COSINE, diagnostic_series, gradient_table, taken_on, token_shares
from camopd.ledger import Line
from camopd.past import known
from camopd.plan import Plan
from camopd.store import Store, join

TEMPLATE = "report.html.j2"
LONGEST_ANSWER = 600  # characters shown of a question or an answer


@dataclass(frozen=True)
class Round:
    """What one finished round left behind.

    Attributes:
        number: counted from 1.
        content_id: of its checkpoint.
        steps: metrics of each optimiser step (docs/data.md).
        selection: branch -> what was selected.
    """

    number: int
    content_id: str
    steps: Sequence[Mapping[str, Any]]
    selection: Mapping[str, Mapping[str, Any]]


def read_rounds(plan: Plan, store: Store) -> list[Round]:
    """The run's finished rounds, in order, as far as their files are there."""
    rounds = []
    for number, uri in enumerate(plan.rounds, 1):
        trained = store.manifest(layout.checkpoint_uri(uri))
        if trained is None and known(layout.checkpoint_uri(uri), store) is not None:
            continue  # removed by camopd gc, and its steps with it
        if trained is None:
            break
        steps = json.loads(store.read(join(layout.checkpoint_uri(uri), "steps.json")))
        selected = store.manifest(layout.select_uri(uri)) is not None
        selection = json.loads(store.read(join(layout.select_uri(uri), "summary.json"))) if selected else counts(steps)
        rounds.append(Round(number, trained.content_id, steps, selection))
    return rounds


def counts(steps: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """What the steps themselves say of selection, where no stage did it: samples and selected samples by branch."""
    totals: dict[str, dict[str, int]] = {}
    for step in steps:
        for name, numbers in step["branches"].items():
            total = totals.setdefault(name, {"num_samples": 0, "num_kept": 0})
            total["num_samples"] += numbers["num_samples"]
            total["num_kept"] += numbers["num_selected"]
    return totals


def render(
    evaluation: Mapping[str, Any],
    plan: Plan,
    rounds: Sequence[Round],
    samples: Sequence[Mapping[str, Any]],
    *,
    books: Sequence[Line] = (),
) -> str:
    """The page as HTML.

    Args:
        evaluation: the content of ``evaluation.json``.
        plan: the run's plan.
        rounds: what the rounds left; may be empty.
        samples: the rows of ``samples.parquet``.
        books: what each stage took (camopd.ledger).
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    steps = [step for done in rounds for step in done.steps]
    names = [branch.name for branch in plan.recipe.branches]
    environment.filters.update(number=number, duration=duration, size=size, interval=interval, shorten=shorten)
    return environment.get_template(TEMPLATE).render(
        plan=plan,
        recipe=plan.recipe,
        evaluation=evaluation,
        version=__version__,
        colours=colours(names),
        verdict=verdict(evaluation),
        contenders=contenders(evaluation),
        charts=draw(evaluation, steps),
        selection=selection_table(rounds),
        gradients=gradient_table(steps, names),
        taken_on=taken_on(steps),
        answers=sample_answers(evaluation, samples, count=plan.recipe.evaluate.answers, seed=plan.recipe.seed),
        settings=flatten(plan.recipe.model_dump(mode="json", exclude={"tracking", "notes", "branches", "promote"})),
        books=books,
        rounds=rounds,
    )


# --- Content (pure) -------------------------------------------------------------------------------------------------------


def verdict(evaluation: Mapping[str, Any]) -> str:
    """The result in one sentence: what came back, what was kept, and whether that is enough."""
    parts = [f"{bounded(share)} of the lost {name} ability is back" for name, share in evaluation["recovered"].items()]
    parts += [f"{bounded(share)} of the {name} score is kept" for name, share in evaluation["retained"].items()]
    said = ", and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
    outcome = "The model passes the gate" if evaluation["decision"]["passed"] else "The model does not pass the gate"
    return f"{outcome}: {said}."


def contenders(evaluation: Mapping[str, Any]) -> list[str]:
    """Keys of the models to compare, the recovered one last: teachers, before, after."""
    return [key for key, model in evaluation["models"].items() if model["round"] is None] + ["before", "after"]


def draw(evaluation: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """The charts as SVG elements: scores, learning curve and, where steps left them, gap, kept share, length and gradients."""
    names = [branch["name"] for branch in evaluation["branches"]]
    scores, models = evaluation["scores"], evaluation["models"]

    def point(score: Mapping[str, float], *, x: float | None = None) -> Point:
        return Point(score["value"] if x is None else x, score["value"], score["low"], score["high"])

    panels = {
        name: {models[key]["label"]: point(scores[key]["branches"][name]) for key in contenders(evaluation)} for name in names
    }
    curve = {name: [point(at["branches"][name], x=at["round"]) for at in evaluation["curve"]] for name in names}
    marks = {
        branch["name"]: scores[branch["teacher"]]["branches"][branch["name"]]["value"]
        for branch in evaluation["branches"]
        if branch["role"] == "recover"
    }
    charts = {
        "scores": dots(panels, title="Scores with 95 % intervals", x_label="score"),
        "curve": lines(curve, title="Score of the student", x_label="round", y_label="score", marks=marks),
    }
    for key, title, y_label in (
        ("gap", "Gap between teacher and student", "mean gap (nats a token)"),
        ("kept_ratio", "Tokens inside the importance bounds", "share of tokens"),
        ("mean_length", "Length of the responses", "mean length (tokens)"),
    ):
        series = step_series(steps, key, names)
        if any(series.values()):
            charts[key] = lines(series, title=title, x_label="optimiser step", y_label=y_label)
    if cosines := diagnostic_series(steps, COSINE):
        cosines = {name: [] for name in names} | cosines  # branches without points: their colours are not a pair's
        title = "Cosine of the branches' gradients"
        charts["cosine"] = lines(cosines, title=title, x_label="optimiser step", y_label="cosine", bottom=None)
        shares = token_shares(steps, names)
        charts["token_share"] = lines(shares, title="Share of tokens", x_label="optimiser step", y_label="share so far")
    return {name: Markup(svg) for name, svg in charts.items()}


def step_series(steps: Iterable[Mapping[str, Any]], key: str, names: Sequence[str]) -> dict[str, list[Point]]:
    """Branch -> one metric over the optimiser steps; steps without a finite value are left out."""
    series: dict[str, list[Point]] = {name: [] for name in names}
    for step in steps:
        for name, numbers in step["branches"].items():
            value = numbers.get(key)
            if value is not None and math.isfinite(value):
                series[name].append(Point(step["step"], value))
    return series


def selection_table(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """What was selected over all rounds, a row a branch: shares of samples and of gap mass, and mean lengths."""
    rows = []
    for branch in dict.fromkeys(name for done in rounds for name in done.selection):
        parts = [done.selection[branch] for done in rounds if branch in done.selection]
        total, kept = (sum(part[name] for part in parts) for name in ("num_samples", "num_kept"))

        def average(name: str, weights: list[int], parts: list[Mapping[str, Any]] = parts) -> float | None:
            known = [
                (part[name], weight)
                for part, weight in zip(parts, weights, strict=True)
                if part.get(name) is not None and weight
            ]
            return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None

        kept_each = [part["num_kept"] for part in parts]
        all_each = [part["num_samples"] for part in parts]
        rows.append(
            {
                "branch": branch,
                "num_samples": total,
                "num_kept": kept,
                "share": kept / total if total else None,
                "kept_mass": average("kept_mass", all_each),
                "length_kept": average("mean_length_kept", kept_each),
                "length_dropped": average("mean_length_dropped", [a - k for a, k in zip(all_each, kept_each, strict=True)]),
            }
        )
    return rows


def sample_answers(
    evaluation: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], *, count: int, seed: int
) -> list[dict[str, Any]]:
    """Items with the answers before and after, branches in turn, drawn by the seed alone: nobody picks the nice ones."""
    after = {(row["task"], row["item"]): row for row in samples if row["model"] == "after"}
    queues = []
    for branch in evaluation["branches"]:
        own = [row for row in samples if row["model"] == "before" and row["task"] in branch["tasks"]]
        own.sort(key=lambda row: hashlib.sha256(f"{seed}/{row['task']}/{row['item']}".encode()).digest())
        queues.append([{"branch": branch["name"], "before": row, "after": after[row["task"], row["item"]]} for row in own])
    in_turn = [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)]
    return sorted(in_turn[:count], key=lambda pair: [branch["name"] for branch in evaluation["branches"]].index(pair["branch"]))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"beta1": 0.9}} -> {"train.beta1": 0.9}``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = "none" if value is None else value
    return flat


# --- How numbers look -----------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3, sign: str = "-") -> str:
    """``0.720``, ``1,536``, ``+0.450`` (with ``sign="+"``), or ``n/a`` where nothing is known."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:{sign},.{digits}f}"


def bounded(share: Mapping[str, float | None]) -> str:
    """``72.0 %``, or that the samples cannot tell."""
    value, low = share["value"], share["low"]
    return "an unknown share" if value is None or low is None else f"{100 * value:.1f} %"


def interval(score: Mapping[str, float | None], digits: int = 3) -> str:
    return f"{number(score['low'], digits)} to {number(score['high'], digits)}"


def duration(seconds: float) -> str:
    """``3 h 05 min``, ``4 min 10 s`` or ``0.4 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def size(count: int) -> str:
    """``812 B``, ``3.4 MB``, ``1.2 TB``: powers of ten."""
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count} B" if power == 0 else f"{count / 1000**power:.1f} {('k', 'M', 'G', 'T')[power - 1]}B"


def shorten(text: str, limit: int = LONGEST_ANSWER) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"
