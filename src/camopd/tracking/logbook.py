"""What a tracking server should hold about a run, read from the store. Sends nothing and knows no server.

A run is a list of entries, each with a key and the content id of what it tells. A tracker compares these with what it holds and
asks only for the facts that it lacks, so that the store is the buffer of everything that could not be sent.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from camopd import __version__
from camopd import plan as layout
from camopd.attempts import cut_offs
from camopd.ledger import Part, as_numbers, ledger, parts_of
from camopd.past import known
from camopd.plan import Plan
from camopd.rounds import stop_reason
from camopd.shards import waiting_share
from camopd.store import Manifest, Store, digest, is_s3, join

MAX_PARAM_LENGTH = 6000  # MLflow cuts a longer parameter without a word
MAX_TAG_LENGTH = 5000  # SQL stores hold this much
MAX_NAME_LENGTH = 250
SHORT_PARAM_LENGTH = 200  # what is shown of a parameter that is too long

# Who started this attempt, where the environment says so.
ATTEMPT_TAGS = {
    "kfp.run_id": "KFP_RUN_ID",
    "kfp.run_url": "KFP_RUN_URL",
    "camopd.image_digest": "CAMOPD_IMAGE_DIGEST",
    "camopd.schedule": "CAMOPD_SCHEDULE",
}


@dataclass(frozen=True)
class Point:
    """One number of a series. Equal points are one point to MLflow, so that sending twice does no harm."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True)
class Dataset:
    """A file of prompts: what a tracker calls it, its content id and where it lies."""

    name: str
    content_id: str
    source: str


@dataclass(frozen=True)
class Facts:
    """What one entry tells.

    Attributes:
        params: canonical text by name, at most 6,000 characters each.
        tags: text by name.
        points: series, all finite.
        datasets: inputs.
        files: text by path.
        summary: points that the run itself shows of an entry that has a nested run of its own.
        began_ms: start, in milliseconds since 1970.
        ended_ms: end, likewise.
    """

    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    datasets: tuple[Dataset, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    summary: tuple[Point, ...] = ()
    began_ms: int | None = None
    ended_ms: int | None = None


@dataclass(frozen=True)
class Entry:
    """A part of the run that is told as a whole: ``settings``, ``plan``, ``round-0001``, ``evaluation-<id>``, ``release-<id>``.

    Attributes:
        key: what it is about.
        content_id: changes when there is something new to tell.
        facts: reads what there is to tell; called only when a tracker lacks it.
        nested: whether it has a run of its own below the recovery's.
    """

    key: str
    content_id: str
    facts: Callable[[], Facts]
    nested: bool = False


@dataclass(frozen=True)
class Identity:
    """Whose run it is: the same recovery in the same place has the same ``run_id`` and ``run_uri`` in every attempt."""

    run_id: str
    run_uri: str
    tags: Mapping[str, str]


# --- Names and values (pure) ----------------------------------------------------------------------------------------------


def safe_name(text: str) -> str:
    """The one rule for names of metrics and parameters: ``acc(%) -> acc_pct``, ``a//b -> a/b``.

    MLflow takes letters, digits and ``_ - . : /`` and blanks, in the form of a path that is already normal.
    """
    clean = re.sub(r"[^\w\-. :/]+", "_", text.replace("%", "pct"))
    parts = (part.strip("_ ") for part in clean.split("/"))
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:MAX_NAME_LENGTH] or "unnamed"


def canonical_text(value: Any) -> str:
    """One text for one value: ``1e-6``, ``"1e-06"`` and ``0.000001`` are the same parameter."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(canonical_text(item) for item in value)
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
        return str(int(value))
    if isinstance(value, float) or (isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value)):
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)
    return str(value)


def params_of(values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters as canonical text, and the files that hold those too long for a parameter as a whole."""
    params, files = {}, {}
    for name, value in values.items():
        name, text = safe_name(name), canonical_text(value)
        if len(text) > MAX_PARAM_LENGTH:
            path = f"params/{name}.txt"
            files[path] = text
            identity = hashlib.sha256(text.encode()).hexdigest()[:16]
            text = f"{text[:SHORT_PARAM_LENGTH]}... ({len(text)} characters, sha256 {identity}, whole in {path})"
        params[name] = text
    return params, files


def flatten(values: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """``{"train": {"beta1": 0.9}} -> {"train.beta1": 0.9}`` with the separator ``.``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}{separator}{below}": v for below, v in flatten(value, separator).items()}
        else:
            flat[name] = value
    return flat


def number(value: Any) -> float | None:
    """The number that a metric is; None for text and lists. JSON without NaN writes it as text, which counts as a number."""
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


def points_of(values: Mapping[str, Any], *, step: int, time_ms: int) -> tuple[list[Point], list[str]]:
    """The finite numbers of a tree of metrics as points, and the names of those that are not finite."""
    numbers = {safe_name(name): number(value) for name, value in flatten(values, "/").items()}
    known = {name: value for name, value in numbers.items() if value is not None}
    points = [Point(name, value, step, time_ms) for name, value in known.items() if math.isfinite(value)]
    return points, [name for name, value in known.items() if not math.isfinite(value)]


def step_points(steps: Iterable[Mapping[str, Any]], *, time_ms: int) -> tuple[list[Point], int, set[str]]:
    """Series of a round's optimiser steps; how many steps held a NaN or inf, and under which names.

    Numbers of the whole step keep their name, a branch's are ``<branch>/<name>``, diagnostics bring their own names.
    """
    points: list[Point] = []
    nonfinite_steps, nonfinite_names = 0, set[str]()
    for record in steps:
        whole = {name: value for name, value in record.items() if name not in ("step", "branches", "diagnostics")}
        values = {**whole, **record.get("branches", {}), **record.get("diagnostics", {})}
        finite, wrong = points_of(values, step=record["step"], time_ms=time_ms)
        points += finite
        nonfinite_steps += bool(wrong)
        nonfinite_names.update(wrong)
    return points, nonfinite_steps, nonfinite_names


def token_shares(steps: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Branch -> its share of the tokens that these optimiser steps were trained on."""
    tokens: dict[str, int] = {}
    for step in steps:
        for name, numbers in step["branches"].items():
            tokens[name] = tokens.get(name, 0) + numbers["tokens"]
    return {name: count / sum(tokens.values()) for name, count in tokens.items()}


# --- The run --------------------------------------------------------------------------------------------------------------


def absolute(uri: str) -> str:
    """The location as another process sees it: local paths are made absolute."""
    return uri if is_s3(uri) else str(Path(uri).expanduser().absolute())


def identity(plan: Plan) -> Identity:
    """The run's id and place, with what is known of its inputs and of this attempt as tags."""
    run_id = plan.run_uri.rpartition("/")[2]
    tags = {f"camopd.content_id.{name}": content_id for name, content_id in plan.content_ids.items()}
    tags |= {name: os.environ[variable] for name, variable in ATTEMPT_TAGS.items() if os.environ.get(variable)}
    tags |= {"camopd.version": __version__}
    if sha := os.environ.get("CAMOPD_GIT_SHA") or _git_sha():
        tags["mlflow.source.git.commit"] = sha
    return Identity(run_id, absolute(plan.run_uri), {"camopd.run_id": run_id, "camopd.run_uri": absolute(plan.run_uri), **tags})


def _git_sha() -> str:
    """HEAD of the checkout that this file is part of; empty for an installed package, also inside another checkout."""
    here = Path(__file__)
    command = ["git", "-C", str(here.parent), "rev-parse", f"HEAD:./{here.name}", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.split()[-1]


def status(plan: Plan, store: Store) -> Literal["RUNNING", "FAILED", "FINISHED"]:
    """FAILED when the run stopped itself, FINISHED when its last checkpoint is evaluated, else RUNNING."""
    if stop_reason(plan.run_uri, store=store) is not None:
        return "FAILED"
    last = known(layout.checkpoint_uri(plan.rounds[-1]), store)
    evaluated = last is not None and any(last.content_id in done.inputs.values() for _, done in _evaluations(plan, store))
    return "FINISHED" if evaluated else "RUNNING"


def entries(plan: Plan, store: Store) -> Iterator[Entry]:
    """All that the store has to tell about the run, in the order in which it came to be."""
    recipe = plan.recipe.model_dump(mode="json", exclude={"tracking", "sources"})
    yield Entry("settings", digest(recipe), partial(_settings, recipe))
    if sources := plan.recipe.sources:
        tags = {f"camopd.source.{name}": source for name, source in sources.items()}
        yield Entry("sources", digest(sources), lambda: Facts(tags=tags))
    planned = store.require(layout.plan_uri(plan.run_uri))
    yield Entry("plan", planned.content_id, partial(_plan, plan, planned, store))
    for round_number, uri in enumerate(plan.rounds, 1):
        trained = known(layout.checkpoint_uri(uri), store)
        if trained is None:
            break
        yield Entry(f"round-{round_number:04d}", trained.content_id, partial(_round, plan, round_number, store), nested=True)
    if (reason := stop_reason(plan.run_uri, store=store)) is not None:
        yield Entry("stop", digest(reason), lambda: Facts(tags={"camopd.stopped": reason[:MAX_TAG_LENGTH]}))
    if silent := cut_offs(plan.run_uri, store):
        counted = ", ".join(f"{count} of {name}" for name, count in silent.items())[:MAX_TAG_LENGTH]
        yield Entry("cut-off", digest(silent), lambda: Facts(tags={"camopd.attempts_without_a_word": counted}))
    for uri, done in _evaluations(plan, store):
        yield Entry(f"evaluation-{_name(uri)}", done.content_id, partial(_evaluation, plan, uri, done, store))
    if books := _books(plan, store):  # when it has ended: a look at every manifest
        yield Entry("ledger", digest(books), partial(_ledger, plan, books, store))
    for file in store.list(join(plan.run_uri, "release")):
        name, _, below = file.name.partition("/")
        if below == "release.json":  # beside it lies the model
            text = store.read(join(plan.run_uri, "release", file.name)).decode()
            yield Entry(f"release-{name}", digest(text), partial(_release, text))


def _settings(recipe: Mapping[str, Any]) -> Facts:
    branches = {branch["name"]: branch for branch in recipe["branches"]}
    params, files = params_of(flatten({**recipe, "branches": branches}, "."))
    return Facts(params=params, files=files | {"recipe.json": json.dumps(recipe, indent=1, ensure_ascii=False)})


def _plan(plan: Plan, planned: Manifest, store: Store) -> Facts:
    datasets = tuple(
        Dataset(f"prompts-{branch.name}", plan.content_ids[f"prompts/{branch.name}"], absolute(branch.prompts))
        for branch in plan.recipe.branches
        if branch.has_prompt_file
    )
    points, _ = points_of({"prepare": planned.metrics}, step=0, time_ms=_time_ms(planned))
    return Facts(points=tuple(points), datasets=datasets, files=_texts(layout.plan_uri(plan.run_uri), planned, store, (".md",)))


def _round(plan: Plan, round_number: int, store: Store) -> Facts:
    uri = plan.rounds[round_number - 1]
    prefixes = {"rollout": layout.rollout_uri(uri)}
    prefixes |= {f"score-{branch.name}": layout.score_uri(uri, branch.name) for branch in plan.recipe.branches}
    prefixes |= {"select": layout.select_uri(uri), "train": layout.checkpoint_uri(uri)}
    # A recovery in one process leaves the checkpoint alone, and a branch without a step in the round has no scores.
    found = {stage: known(prefix, store) for stage, prefix in prefixes.items()}
    stages = {stage: done for stage, done in found.items() if done is not None}
    whole = store.manifest(layout.checkpoint_uri(uri)) is not None  # else camopd gc has removed it, and the steps with it
    steps = json.loads(store.read(join(layout.checkpoint_uri(uri), "steps.json"))) if whole else []
    time_ms = _time_ms(stages["train"])
    series, nonfinite_steps, nonfinite_names = step_points(steps, time_ms=time_ms)
    numbers: dict[str, Any] = {
        stage: {**waiting_share(done.seconds, done.seconds_waited), **done.metrics, "seconds": done.seconds}
        for stage, done in stages.items()
    }
    numbers["token_share"] = token_shares(steps)
    summary, _ = points_of({**numbers, "nonfinite_steps": nonfinite_steps}, step=round_number, time_ms=time_ms)
    tags = {"camopd.round": str(round_number)}
    tags |= {f"camopd.content_id.{stage}": done.content_id for stage, done in stages.items()}
    if nonfinite_names:
        tags["camopd.nonfinite"] = ", ".join(sorted(nonfinite_names))[:MAX_TAG_LENGTH]
    began_ms = min(_time_ms(done) - round(1000 * done.seconds) for done in stages.values())
    return Facts(tags=tags, points=(*series, *summary), summary=tuple(summary), began_ms=began_ms, ended_ms=time_ms)


def _evaluation(plan: Plan, uri: str, done: Manifest, store: Store) -> Facts:
    evaluation = json.loads(store.read(join(uri, "evaluation.json")))
    decision = evaluation["decision"]
    # The metric's step is the round that was evaluated: the store may hold the evaluation of an earlier last round.
    rounds = evaluation.get("models", {}).get("after", {}).get("round") or plan.recipe.num_rounds
    points, _ = points_of({"evaluation": evaluation["headline"]}, step=rounds, time_ms=_time_ms(done))
    tags = {"camopd.decision": "pass" if decision["passed"] else "fail", "camopd.reasons": "\n".join(decision["reasons"])}
    files = _texts(uri, done, store, (".html", ".json"))
    return Facts(tags={k: v[:MAX_TAG_LENGTH] for k, v in tags.items()}, points=tuple(points), files=files)


def _books(plan: Plan, store: Store) -> dict[str, dict[str, float]]:
    """What a run that has ended has taken, by stage; nothing where some of it is gone."""
    evaluated = [Part("evaluate", done) for _, done in _evaluations(plan, store)]
    if not evaluated and stop_reason(plan.run_uri, store=store) is None:
        return {}
    parts = parts_of(plan, store)
    return {} if parts is None else as_numbers(ledger([*parts, *evaluated]))


def _ledger(plan: Plan, books: Mapping[str, Mapping[str, float]], store: Store) -> Facts:
    """A point a number at the step of the last finished round, so that the series shows how it grew."""
    trained = [known(layout.checkpoint_uri(uri), store) for uri in plan.rounds]
    done = [manifest for manifest in trained if manifest is not None]
    last = done[-1] if done else store.require(layout.plan_uri(plan.run_uri))
    points, _ = points_of({"ledger": books}, step=len(done), time_ms=_time_ms(last))
    return Facts(points=tuple(points), files={"ledger.json": json.dumps(books, indent=1) + "\n"})


def _release(text: str) -> Facts:
    release = json.loads(text)
    tags = {f"camopd.release.{name}": canonical_text(release[name]) for name in ("status", "model_name", "version", "alias")}
    reasons = "\n".join(release["reasons"])[:MAX_TAG_LENGTH]
    return Facts(tags=tags | {"camopd.release.reasons": reasons}, files={"release.json": text})


# --- Reading --------------------------------------------------------------------------------------------------------------


def _evaluations(plan: Plan, store: Store) -> list[tuple[str, Manifest]]:
    """Prefix and manifest of each finished evaluation, the oldest first."""
    above = join(plan.run_uri, "evaluation")
    names = sorted({file.name.partition("/")[0] for file in store.list(above)})
    found = [(join(above, name), store.manifest(join(above, name))) for name in names]
    return sorted(((uri, done) for uri, done in found if done is not None), key=lambda pair: pair[1].created_at)


def _texts(uri: str, done: Manifest, store: Store, suffixes: tuple[str, ...]) -> dict[str, str]:
    """The prefix's files for people, by name."""
    return {f.name: store.read(join(uri, f.name)).decode() for f in done.files if f.name.endswith(suffixes)}


def _time_ms(manifest: Manifest) -> int:
    return round(1000 * datetime.fromisoformat(manifest.created_at).timestamp())


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]
