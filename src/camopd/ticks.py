"""One tick of a schedule: is there a model that has not been recovered yet?

<output>/schedules/<name>/<model>/         a prefix for each content that was found (with its teachers', where these count)
    attempts/<job>.json                    a pipeline run that was let go on to recover it, and for which wish
    gave-up-<wish>-<attempts>.json         the tick that has told people so

What became of an attempt is read from the records of its run, so nobody has to write it down. A model that was recovered is
known whatever the settings are by now; one that failed is tried again a few times, and anew when the wish has changed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from camopd import claims, tracking
from camopd.config import AS_IN_RECIPE, Recipe, load_recipe
from camopd.errors import CamopdError, InputError, Problem, ScheduleError
from camopd.inputs.registered import resolve_models
from camopd.outcome import error_uri, job_place, job_record, registered, result_of
from camopd.plan import Plan
from camopd.prepare import resolve
from camopd.rounds import stop_reason
from camopd.store import Store, digest, join, parent

NO_SCHEDULE = ("", "none")  # names in the run form of a run that no schedule has started
OUTCOMES = ("new", "again", "skipped", "gave-up", "failed")


@dataclass(frozen=True)
class Schedule:
    """What a schedule is asked for.

    Attributes:
        name: its name among those of one output.
        max_attempts: how often a recovery that fails is started for the same wish.
        again_for_new_teachers: a new teacher makes the same model a new one.
    """

    name: str
    max_attempts: int = 3
    again_for_new_teachers: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,51}[a-z0-9])?", self.name):
            fix = "use up to 53 small letters, digits and hyphens"
            problems.append(Problem("schedule_name", f"{self.name[:80]!r} cannot name a schedule", fix))
        if self.max_attempts < 1:
            problems.append(
                Problem("schedule_max_attempts", f"{self.max_attempts} attempts would try nothing", "set 1 or more")
            )
        if problems:
            raise InputError(problems)


@dataclass(frozen=True)
class Found:
    """What a tick has found.

    Attributes:
        asked: the recipe as asked for, names in a registry included.
        recipe: with places in their stead.
        content_ids: of all inputs.
        recovery: the run that made the model, where it is a recovered one.
    """

    asked: Recipe
    recipe: Recipe
    content_ids: Mapping[str, str]
    recovery: str = ""

    @property
    def model_id(self) -> str:
        return self.content_ids["student"]

    @property
    def wish(self) -> str:
        """What is to be done with the model: who changes it wants another try."""
        asked = self.asked.model_dump(mode="json", exclude={"notes", "sources", "tracking"})
        return digest({"recipe": asked, "inputs": dict(self.content_ids)}).removeprefix("sha256:")[:16]

    @property
    def version(self) -> str:
        """How people call the model: its version in the registry, else its place."""
        source = self.recipe.sources.get("student")
        return f"version {source.rpartition('/')[2]}" if source else self.recipe.student

    @property
    def claims_uri(self) -> str:
        return claims.claims_uri(self.recipe.output, self.model_id)


@dataclass(frozen=True)
class Verdict:
    """What the tick has come to: one of OUTCOMES (``new`` and ``again`` go on), and a sentence."""

    outcome: Literal["new", "again", "skipped", "gave-up"]
    sentence: str

    @property
    def goes_on(self) -> bool:
        return self.outcome in ("new", "again")


@dataclass(frozen=True)
class _Attempt:
    """A pipeline run that was let go on."""

    job: str
    wish: str
    time: float
    version: str


def schedule_uri(output: str, name: str) -> str:
    return join(output, "schedules", name)


def run(schedule: Schedule, recipe: str, parameters: Mapping[str, Any], job: str, store: Store) -> Verdict:
    """Look what there is, decide, and say so in the job's record and in the tracking server.

    Args:
        schedule: its wish.
        recipe: name, path, URI or text of the recipe.
        parameters: values from the run form that go before the recipe's.
        job: id of this pipeline run.
        store: where to read and write.

    Raises:
        InputError: the recipe is wrong, or a model cannot be found.
        ScheduleError: the model was tried as often as it may be, and this is the first tick that finds so.
    """
    with job_record(recipe, parameters.get("output_uri", AS_IN_RECIPE), job, stage="resolve", store=store) as record:
        asked = load_recipe(recipe, parameters)
        tracker = tracking.tracker_for(asked.tracking)

        def tell(outcome: str, **tags: str) -> None:
            told = {f"camopd.{name}": text for name, text in tags.items()}
            tracking.log_tick(schedule.name, schedule_uri(asked.output, schedule.name), outcome, told, tracker=tracker)

        try:
            resolved = resolve_models(asked, tracker, store)
            content_ids, problems = resolve(resolved.recipe, store)
            if problems or resolved.problems:
                raise InputError([*resolved.problems, *problems])
            student = resolved.located.get(asked.student)
            found = Found(asked, resolved.recipe, content_ids, student.recovery if student else "")
            verdict = tick(schedule, found, job, store)
        except CamopdError as error:
            tell("failed", status=str(error))
            raise
        tell(verdict.outcome, status=verdict.sentence, version=found.version, content_id=found.model_id)
        print(f"schedule {schedule.name}: {verdict.sentence}")
        if verdict.outcome == "gave-up":
            raise ScheduleError(verdict.sentence)
        record.pop("skipped", None)  # of an attempt of this task
        if verdict.goes_on:
            record |= {"claim": found.claims_uri, "models": {name: asdict(at) for name, at in resolved.located.items()}}
        else:
            record["skipped"] = verdict.sentence
        return verdict


def tick(schedule: Schedule, found: Found, job: str, store: Store) -> Verdict:
    """Decide, and claim the model for this pipeline run where it is to go on.

    Of several that find the same at once, one goes on: the claim decides, and who has it looks again.

    Args:
        schedule: its wish.
        found: what there is now.
        job: id of this pipeline run; asked again, it gets the same answer.
        store: where the records lie.
    """
    if found.recovery:  # the alias that a schedule follows may be the one that its own recoveries move
        return Verdict("skipped", f"skipped: {found.version} is what the recovery {found.recovery} made, so nothing is lost")
    place = _model_uri(schedule, found)
    verdict = _verdict(schedule, found, place, job, store)
    if not verdict.goes_on:
        return verdict
    other = claims.take(found.claims_uri, job, store)
    if other is not None:
        return _busy(other)
    verdict = _verdict(schedule, found, place, job, store)
    if verdict.goes_on:
        attempt = _Attempt(job, found.wish, time.time(), found.version)
        store.write(join(place, "attempts", f"{job}.json"), json.dumps(asdict(attempt), indent=1).encode(), if_absent=True)
    else:
        claims.release(found.claims_uri, job, store)
    return verdict


def _model_uri(schedule: Schedule, found: Found) -> str:
    """Prefix of what the schedule has done about the model."""
    ids = {"student": found.model_id}
    if schedule.again_for_new_teachers:
        ids |= {name: content_id for name, content_id in found.content_ids.items() if name.startswith("teacher/")}
    identity = digest(ids) if len(ids) > 1 else found.model_id
    return join(schedule_uri(found.recipe.output, schedule.name), identity.removeprefix("sha256:")[:16])


def _verdict(schedule: Schedule, found: Found, place: str, job: str, store: Store) -> Verdict:
    holder = claims.holder(found.claims_uri, store)
    if holder is not None and holder.job != job:
        return _busy(holder)
    attempts = _attempts(place, store)
    for earlier in reversed(attempts):
        if (known := _recovered(earlier, found, store)) is not None:
            return Verdict("skipped", known)
    failed = [earlier for earlier in attempts if earlier.wish == found.wish and earlier.job != job]
    if not failed:
        return Verdict("new", f"new: {found.version} (content id {found.model_id}) has not been recovered")
    reason, is_final = _why(failed[-1], found, store)
    if is_final or len(failed) >= schedule.max_attempts:
        times = f"{len(failed)} attempt{'s' if len(failed) > 1 else ''}"
        sentence = f"given up after {times} on {found.version} (content id {found.model_id}): {reason}"
        uri = join(place, f"gave-up-{found.wish}-{len(failed)}.json")
        told = json.dumps({"job": job, "time": time.time(), "reason": sentence}, indent=1, ensure_ascii=False).encode()
        first = store.write(uri, told, if_absent=True) or json.loads(store.read(uri))["job"] == job  # a task that is retried
        return Verdict("gave-up" if first else "skipped", sentence)
    attempt = f"attempt {len(failed) + 1} of {schedule.max_attempts} on {found.version}"
    return Verdict("again", f"{attempt}; the last failed: {reason}")


def _attempts(place: str, store: Store) -> list[_Attempt]:
    """The oldest first."""
    folder = join(place, "attempts")
    found = [_Attempt(**json.loads(store.read(join(folder, file.name)))) for file in store.list(folder)]
    return sorted(found, key=lambda attempt: attempt.time)


def _record(job: str, found: Found, store: Store) -> dict[str, Any]:
    """What ``prepare`` left of a pipeline run (camopd.outcome)."""
    uri = job_place(found.recipe.output, job)
    return json.loads(store.read(uri)) if store.stat(uri) is not None else {}


def _recovered(attempt: _Attempt, found: Found, store: Store) -> str | None:
    """A sentence on the recovery that the attempt's run has come to, if it has: also when the gate said no."""
    run_uri = _record(attempt.job, found, store).get("run")
    result = result_of(Plan.load(store, run_uri), store) if run_uri else None
    if run_uri is None or result is None:
        return None
    day = store.require(parent(result.report)).created_at[:10]
    return (
        f"skipped: nothing new since {attempt.version} (content id {found.model_id}, recovered on {day} by run {attempt.job} "
        f"in {run_uri}, registered as {registered(result.release)})"
    )


def _why(attempt: _Attempt, found: Found, store: Store) -> tuple[str, bool]:
    """Why an attempt has no result, and whether another one of the same wish would end alike."""
    record = _record(attempt.job, found, store)
    run_uri = record.get("run")
    if run_uri is None:
        return record.get("reason", "prepare left no word"), False
    stopped = stop_reason(run_uri, store=store)
    if stopped is not None:
        return f"it stopped itself in {stopped}", True  # seeds are the run's: it would stop there again
    uri = error_uri(run_uri)
    error = json.loads(store.read(uri)) if store.stat(uri) is not None else {}
    if error and store.manifest(error["output"]) is None:
        return f"{error['stage']}: {error['reason']}", False
    return f"run {attempt.job} was cut off: killed, evicted or stopped by somebody", False


def _busy(claim: claims.Claim) -> Verdict:
    since = datetime.fromtimestamp(claim.since, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Verdict("skipped", f"skipped: run {claim.job} has been at work on this model since {since}")
