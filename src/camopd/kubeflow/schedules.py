"""The file of schedules that `camopd sync` makes true, and what is wrong with it: all of it at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from itertools import islice
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from camopd.errors import InputError, Problem
from camopd.kubeflow.checks import problems_of
from camopd.kubeflow.cron import Cron, parse
from camopd.kubeflow.form import RECIPE, typed, wish
from camopd.kubeflow.spec import Spec, inputs_of
from camopd.recipe.explain import did_you_mean
from camopd.recipe.registered import check_registered, is_registered
from camopd.store import Store, check_uri, digest, is_s3
from camopd.ticks import NO_SCHEDULE, Schedule

MODEL = "input_domain_model_uri"
OWN = {RECIPE: "recipe", MODEL: "follow", "schedule_name": "name", "schedule_max_attempts": "max_attempts"}
OWN |= {"schedule_again_for_new_teachers": "again_for_new_teachers"}


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Table):
    """One schedule of the file."""

    name: str = Field(description="Its name: small letters, digits and hyphens.")
    cron: str = Field(description="Six fields, seconds first.")
    follow: str = Field(description="The model to recover: models:/NAME@alias, models:/NAME#tag=value or an s3:// prefix.")
    recipe: str = Field(description="Name of a recipe in the image, its s3:// URI, or TOML text.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Other fields of the run form.")
    max_attempts: int = Field(3, description="How often a recovery that fails is started.")
    again_for_new_teachers: bool = Field(False, description="Recover a known model again when a teacher is new.")
    enabled: bool = Field(True, description="Off: as if it were not in the file.")


class File(_Table):
    """The file."""

    owner: str = Field(pattern=r"^[a-z0-9.-]{1,63}/[a-z0-9.-]{1,63}$", description="<namespace>/<release>: whose schedules.")
    pipeline: str = Field("camopd-recovery", min_length=1, description="Name of the pipeline.")
    version: str = Field("", description="What people call what is installed.")
    experiment: str = Field("camopd", min_length=1, description="KFP's experiment.")
    namespace: str = Field("", description="Of runs, where Kubeflow has many users.")
    service_account: str = Field("", description="Of the runs' pods; empty: the server's default.")
    time_zone: str = Field("UTC", description="CRON_SCHEDULE_TIMEZONE of KFP's scheduledworkflow controller.")
    pools: dict[str, Any] = Field(default_factory=dict, description="As in pipelines/pools.example.toml.")
    schedules: tuple[Entry, ...] = Field((), description="The schedules.")


@dataclass(frozen=True)
class Wanted:
    """A schedule as the cluster should have it.

    Attributes:
        name: of the schedule.
        cron: the line.
        parameters: of each run.
        next_times: when it will fire.
        caution: what could not be checked.
    """

    name: str
    cron: str
    parameters: Mapping[str, Any]
    next_times: tuple[datetime, ...]
    caution: str = ""


def read(path: Path) -> File:
    """Read a file of schedules, JSON or YAML. Raises InputError with every key that is wrong."""
    values = _values(path)
    try:
        return File.model_validate(values)
    except ValidationError as error:
        raise InputError([_problem(detail, values) for detail in error.errors(include_url=False)]) from None


def owner_of(path: Path) -> tuple[str, str]:
    """Owner and namespace alone, for a removal, which no mistake in the rest must stop. Raises InputError."""
    values = _values(path)
    try:
        file = File.model_validate({key: values[key] for key in ("owner", "namespace") if key in values})
    except ValidationError as error:
        raise InputError([_problem(detail, values) for detail in error.errors(include_url=False)]) from None
    return file.owner, file.namespace


def wanted(file: File, spec: Spec, *, store: Store, now: datetime | None = None) -> list[Wanted]:
    """The schedules that are on, checked against the pipeline that they will run.

    Args:
        file: the file.
        spec: the compiled pipeline.
        store: reads recipes.
        now: from when on the next times are told.

    Raises:
        InputError: every problem of every schedule, also of those that are off.
    """
    problems: list[Problem] = []
    found = []
    zone = _zone(file.time_zone, problems)
    names = [entry.name for entry in file.schedules]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem(f"schedules.{name}", f"stands there {names.count(name)} times", "give each its own name"))
    for entry in file.schedules:
        wrong, cron = _own_problems(entry)
        parameters, more, caution = _parameters(entry, spec, store)
        problems += [Problem(f"schedules.{entry.name}.{each.where}", each.what, each.fix) for each in [*wrong, *more]]
        if entry.enabled and cron is not None:
            times = tuple(islice(cron.times(now or datetime.now(UTC), zone), 3))
            found.append(Wanted(entry.name, entry.cron, parameters, times, caution))
    if problems:
        raise InputError(problems)
    return found


def wish_digest(file: File, schedule: Wanted, version_name: str) -> str:
    """Identity of all that a recurring run is made of; another one is another recurring run."""
    whole = {"cron": schedule.cron, "parameters": dict(schedule.parameters), "version": version_name}
    whole |= {"pipeline": file.pipeline, "experiment": file.experiment, "service_account": file.service_account}
    return digest(whole).removeprefix("sha256:")[:16]


# --- Checks ---------------------------------------------------------------------------------------------------------------


def _values(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # which reads JSON, too
    except (OSError, UnicodeDecodeError) as error:
        raise InputError([Problem(str(path), f"cannot be read ({error})", "give a file of schedules")]) from None
    except yaml.YAMLError as error:
        raise InputError([Problem(str(path), f"is neither JSON nor YAML: {error}", "correct it")]) from None
    if not isinstance(values, dict):
        raise InputError(
            [Problem(str(path), "is not a table with owner and schedules", "see pipelines/schedules.example.yaml")]
        )
    return values


def _problem(detail: Mapping[str, Any], values: Mapping[str, Any]) -> Problem:
    """``schedules.icd-coder.cron`` rather than ``schedules.0.cron``."""
    place = list(detail["loc"])
    if place[:1] == ["schedules"] and len(place) > 1:
        entry = values["schedules"][place[1]]
        place[1] = entry.get("name", place[1]) if isinstance(entry, dict) else place[1]
    fields = (Entry if place[:1] == ["schedules"] and len(place) > 2 else File).model_fields
    known = detail["type"] != "extra_forbidden"
    what = detail["msg"] if known else "there is no such key"
    fix = (fields[place[-1]].description or "") if known and place[-1] in fields else did_you_mean(str(place[-1]), list(fields))
    return Problem(".".join(map(str, place)), what, fix)


def _zone(name: str, problems: list[Problem]) -> tzinfo:
    try:
        return UTC if name == "UTC" else ZoneInfo(name)  # an image without a table of time zones has this one
    except (ValueError, OSError, ZoneInfoNotFoundError):
        fix = "write the value of CRON_SCHEDULE_TIMEZONE there, such as Europe/Berlin, or leave it out for UTC"
        problems.append(Problem("time_zone", f"{name!r} is no time zone that is known here", fix))
        return UTC


def _own_problems(entry: Entry) -> tuple[list[Problem], Cron | None]:
    problems = []
    cron = None
    try:
        Schedule(entry.name, entry.max_attempts)
    except InputError as error:
        own = {field: key for field, key in OWN.items() if field.startswith("schedule_")}
        problems += [Problem(own[each.where], each.what, each.fix) for each in error.problems]
    if entry.name in NO_SCHEDULE:
        problems.append(Problem("name", f"{entry.name!r} means a run that no schedule has started", "choose another name"))
    try:
        cron = parse(entry.cron)
    except ValueError as error:
        problems.append(Problem("cron", str(error)))
    try:
        place = check_registered(entry.follow) if is_registered(entry.follow) else check_uri(entry.follow)
        if not is_registered(place) and not is_s3(place):
            problems.append(Problem("follow", f"{place} is a folder, and pods share no disk", "give an s3:// prefix"))
    except ValueError as error:
        problems.append(Problem("follow", str(error)))
    return problems, cron


def _parameters(entry: Entry, spec: Spec, store: Store) -> tuple[dict[str, Any], list[Problem], str]:
    """The run form, what is wrong with it, and what could not be looked at.

    A recipe of the image and a text travel as text: what was checked is what runs. One on S3 is read again by every tick.
    """
    own = [
        Problem(f"parameters.{field}", "is the schedule's own", f"say it by {OWN[field]}")
        for field in entry.parameters
        if field in OWN
    ]
    unknown = [field for field in entry.parameters if field not in inputs_of(spec)]
    own += [
        Problem(f"parameters.{field}", "the run form has no such field", did_you_mean(field, list(inputs_of(spec))))
        for field in unknown
    ]
    given = {field: _text(value) for field, value in entry.parameters.items() if field not in OWN and field not in unknown}
    set_here = {
        "schedule_again_for_new_teachers": entry.again_for_new_teachers,
        "schedule_max_attempts": entry.max_attempts,
        "schedule_name": entry.name,
    }
    try:
        asked = wish(entry.recipe, {**given, MODEL: entry.follow}, spec, store=store)
    except InputError as error:
        if is_s3(entry.recipe) and any(problem.where == entry.recipe for problem in error.problems):
            form = {field: typed(value, inputs_of(spec)[field]) for field, value in given.items()}
            return (
                {**form, RECIPE: entry.recipe, MODEL: entry.follow, **set_here},
                own,
                f"its recipe was not checked: {error.problems[0].what}",
            )
        return {}, [*own, *(each for each in error.problems if each.where != MODEL)], ""
    own += [each for each in problems_of(asked, spec) if each.where != MODEL]
    form = {**asked.form, **set_here}
    return form | ({RECIPE: entry.recipe} if is_s3(entry.recipe) else {}), own, ""


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
