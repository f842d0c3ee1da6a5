"""The recurring runs of an owner are made what a file says: create the new one, switch the old one off, delete it when idle.

KFP has no update of a recurring run, and kills the run in flight of one that is deleted. What a recurring run is about stands
in its description, since it has no labels. Each call looks at what is there, so that it may be killed, called twice, or called
twice at once: of two equal ones the older stays.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from camopd.errors import InputError, Problem
from camopd.kubeflow.client import ApiError, Connection
from camopd.kubeflow.schedules import File, Wanted, wanted, wish_digest
from camopd.kubeflow.submit import experiment_id
from camopd.kubeflow.versions import EQUALS, Version, compiled, uploaded, version_of
from camopd.store import Store

ABOUT = "Kept by camopd sync for {owner}: schedule {name}, wish {digest}. Change it in the values, not here."
_ABOUT = re.compile(r"Kept by camopd sync for (?P<owner>\S+): schedule (?P<name>\S+), wish (?P<digest>[0-9a-f]{16})\.")
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
SETTLE_SECONDS = 5.0  # until a run that the scheduler has just started is known to the API
PAGE = 200  # the most that the API gives at once

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recurring:
    """A recurring run of ours on the server.

    Attributes:
        id: the server's.
        name: of the schedule.
        digest: of the wish that it was made from.
        enabled: whether it fires.
        made: when it was created, sortable.
        content: what it does, to be compared with a wish's.
    """

    id: str
    name: str
    digest: str
    enabled: bool
    made: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Action:
    """What is to be done about a schedule. ``recurring`` is what is there already; ``why`` is for people."""

    kind: Literal["keep", "create", "enable", "retire"]
    name: str
    why: str
    recurring: Recurring | None = None


def sync(connection: Connection, file: File, *, store: Store, say: Say, dry_run: bool = False) -> bool:
    """Make it so. Returns whether anything was, or in a dry run would be, done.

    Args:
        connection: to the KFP API.
        file: what is wanted.
        store: reads recipes.
        say: is told each thing, a sentence at a time.
        dry_run: only tell.

    Raises:
        InputError: every problem of the file; nothing was done.
        ApiError: the API refused; what was done stays, and the next call goes on from there.
    """
    with _compiled(file) as path:
        version = version_of(connection, path, file.pipeline)
        schedules = wanted(file, version.spec, store=store)
        is_new = not version.version_id
        if is_new:
            say(f"pipeline {file.pipeline}: version {version.name} {'would be' if dry_run else 'is'} uploaded")
        if is_new and not dry_run:
            version = uploaded(connection, version)
    experiment = "" if dry_run else experiment_id(connection, file.experiment)
    bodies = {each.name: _body(file, each, version, experiment) for each in schedules}
    actions = decide(bodies, wishes(file, schedules, version), recurring_runs(connection, file.owner))
    for action in actions:
        if not dry_run and action.kind == "create":
            connection.recurring.recurring_run_service_create_recurring_run(bodies[action.name])
        elif not dry_run and action.kind == "enable" and action.recurring:
            connection.recurring.recurring_run_service_enable_recurring_run(action.recurring.id)
        say(f"schedule {action.name}: {_told(action, dry_run)}")
    left = [action for action in actions if action.kind == "retire"]
    if not dry_run and any(action.kind == "create" for action in actions):  # by now another sync may have made the same
        again = decide(bodies, wishes(file, schedules, version), recurring_runs(connection, file.owner))
        left = [action for action in again if action.kind == "retire"]
    if not dry_run:
        _retire(connection, [action.recurring for action in left if action.recurring], say)
    for each in schedules:
        say(_next(each, file.time_zone))
    changed = is_new or any(action.kind != "keep" for action in actions)
    if not changed:
        say(f"Nothing to do: pipeline and {len(schedules)} schedules are as the file says.")
    return changed


def remove(connection: Connection, owner: str, *, say: Say, dry_run: bool = False) -> bool:
    """Switch off all recurring runs of an owner, and delete those with no run in flight. Returns whether there were any."""
    found = recurring_runs(connection, owner)
    for each in found:
        say(f"schedule {each.name}: {'would be' if dry_run else 'is'} removed")
    if not dry_run:
        _retire(connection, found, say)
    if not found:
        say(f"Nothing to do: {owner} has no schedules.")
    return bool(found)


# --- What is to be done (pure) --------------------------------------------------------------------------------------------


def wishes(file: File, schedules: Sequence[Wanted], version: Version) -> dict[str, str]:
    """Digest of each schedule's wish."""
    return {each.name: wish_digest(file, each, version.name) for each in schedules}


def decide(bodies: Mapping[str, Mapping[str, Any]], digests: Mapping[str, str], there: Sequence[Recurring]) -> list[Action]:
    """What is to be done so that each schedule has one recurring run as it is wished, and nobody else any.

    Args:
        bodies: what each schedule's recurring run would be made from.
        digests: of their wishes.
        there: the owner's recurring runs.
    """
    actions: list[Action] = []
    kept: set[str] = set()
    for name, body in bodies.items():
        own = [each for each in there if each.name == name]
        alike = [each for each in own if each.digest == digests[name]]
        right = [each for each in alike if not _differences(each, body)]
        best = min(right, key=lambda each: (not each.enabled, each.made, each.id), default=None)
        if best is None:
            changed = sorted({difference for each in alike for difference in _differences(each, body)})
            why = f"its {', '.join(changed)} was changed by hand" if changed else "its wish has changed" if own else "it is new"
            actions.append(Action("create", name, why))
        elif best.enabled:
            actions.append(Action("keep", name, "is as the file says", best))
        else:
            actions.append(Action("enable", name, "it was switched off", best))
        kept |= {best.id} if best else set()
    for each in there:
        if each.id not in kept:
            why = "another one stands for it" if each.name in bodies else "the file has it no more, or switches it off"
            actions.append(Action("retire", each.name, why, each))
    return actions


def _differences(there: Recurring, body: Mapping[str, Any]) -> list[str]:
    """What of a recurring run is not as it was made; the experiment's id is not known in a dry run."""
    return [name for name, value in _content(body).items() if value != "" and there.content.get(name) != value]


def _content(body: Mapping[str, Any]) -> dict[str, Any]:
    reference = body.get("pipeline_version_reference") or {}
    return {
        "cron": ((body.get("trigger") or {}).get("cron_schedule") or {}).get("cron"),
        "parameters": (body.get("runtime_config") or {}).get("parameters"),
        "pipeline version": reference.get("pipeline_version_id", ""),
        "concurrency": str(body.get("max_concurrency")),
        "catch-up": not body.get("no_catchup"),
        "service account": body.get("service_account", ""),
        "experiment": body.get("experiment_id", ""),
    }


def _told(action: Action, dry_run: bool) -> str:
    if action.kind == "keep":
        return action.why
    done = {"create": "created", "enable": "switched on again", "retire": "retired"}[action.kind]
    return f"{'would be' if dry_run else 'is'} {done}, since {action.why}"


def _next(schedule: Wanted, time_zone: str) -> str:
    times = ", ".join(at.strftime("%Y-%m-%d %H:%M:%S") for at in schedule.next_times)
    caution = f"; {schedule.caution}" if schedule.caution else ""
    where = "" if time_zone != "UTC" else ", unless KFP's scheduler has another CRON_SCHEDULE_TIMEZONE"
    return f"schedule {schedule.name}: {schedule.cron!r} fires next at {times} ({time_zone}{where}){caution}"


# --- What is there, and what is done --------------------------------------------------------------------------------------


def recurring_runs(connection: Connection, owner: str) -> list[Recurring]:
    """The recurring runs that were made for an owner."""
    found = []
    for each in _pages(connection.recurring.recurring_run_service_list_recurring_runs, "recurring_runs", **connection.owned):
        about = _ABOUT.match(each.description or "")
        if about is None or about["owner"] != owner:
            continue
        content = _content(connection.recurring.api_client.sanitize_for_serialization(each))
        is_enabled, made = each.status == "ENABLED", str(each.created_at)
        found.append(Recurring(each.recurring_run_id, about["name"], about["digest"], is_enabled, made, content))
    return found


def in_flight(connection: Connection, recurring_run_id: str) -> list[str]:
    """Ids of the runs of a recurring run that have not ended."""
    wanted = {"predicates": [{"operation": EQUALS, "key": "recurring_run_id", "stringValue": recurring_run_id}]}
    listed = _pages(connection.runs.run_service_list_runs, "runs", filter=json.dumps(wanted), **connection.owned)
    return [each.run_id for each in listed if each.state not in ENDED]


def _pages(ask: Callable[..., Any], key: str, **asked: Any) -> Iterator[Any]:
    token = ""
    while True:
        page = ask(page_size=PAGE, page_token=token, **asked)
        yield from getattr(page, key) or ()
        token = page.next_page_token or ""
        if not token:
            return


def _retire(connection: Connection, old: Sequence[Recurring], say: Say) -> None:
    """Switch all off, and delete those with nothing in flight: in this order, so that nothing begins in between."""
    for each in old:
        if each.enabled:
            with _unless_gone():
                connection.recurring.recurring_run_service_disable_recurring_run(each.id)
    if any(each.enabled for each in old):
        time.sleep(SETTLE_SECONDS)
    for each in old:
        with _unless_gone():
            if running := in_flight(connection, each.id):
                say(
                    f"schedule {each.name}: the old one is off; it stays until its run {running[0]} has ended, for a later sync"
                )
            else:
                connection.recurring.recurring_run_service_delete_recurring_run(each.id)


@contextmanager
def _unless_gone() -> Iterator[None]:
    """Another sync may have been faster."""
    try:
        yield
    except ApiError as error:
        if error.status != 404:
            raise


def _body(file: File, schedule: Wanted, version: Version, experiment: str) -> dict[str, Any]:
    """What the API is asked to make. Caching is off in the compiled pipeline, task by task."""
    digest = wish_digest(file, schedule, version.name)
    body = {
        "display_name": f"camopd-{schedule.name}-{digest[:8]}",
        "description": ABOUT.format(owner=file.owner, name=schedule.name, digest=digest),
        "pipeline_version_reference": {"pipeline_id": version.pipeline_id, "pipeline_version_id": version.version_id},
        "runtime_config": {"parameters": dict(schedule.parameters)},
        "experiment_id": experiment,
        "trigger": {"cron_schedule": {"cron": schedule.cron}},
        "mode": "ENABLE",
        "no_catchup": True,
        "max_concurrency": "1",
    }
    return body | ({"service_account": file.service_account} if file.service_account else {})


@contextmanager
def _compiled(file: File) -> Iterator[Path]:
    """The pipeline, compiled for the file's pools. Raises InputError for these, ClusterError where its sources are missing."""
    with ExitStack() as opened:
        pools = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="camopd-")), "pools.json")
        pools.write_text(json.dumps(file.pools), encoding="utf-8")
        try:
            path = opened.enter_context(compiled(pools if file.pools else None))
        except InputError as error:
            said = [Problem("pools", each.what.replace(f"{pools}: ", ""), each.fix) for each in error.problems]
            raise InputError(said) from None
        yield path
