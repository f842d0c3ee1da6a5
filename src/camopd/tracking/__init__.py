"""Following a run: what the store holds is sent to a tracking server, and the registry behind one small interface.

Tracking follows the store. ``sync`` compares what the store holds (logbook.py) with what the server has and sends what is
missing: a retry sends nothing twice, an outage costs a log line, and the next sync sends what was missed.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from camopd.config import Tracking
from camopd.errors import TrackingError
from camopd.plan import Plan
from camopd.store import Store, digest, join
from camopd.tracking import logbook
from camopd.tracking.logbook import Entry, Facts, Identity, Point

log = logging.getLogger(__name__)

SYNC_SECONDS = 60.0


class OutageError(TrackingError):
    """No answer, or one that may be another in a while: refused connection, time-out, 5xx, a locked database."""


# --- What the stages ask for ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        number: counted by the registry.
        tags: text by name.
        created: when it was made, in seconds since 1970.
        source: where its files are, in the registry's own words.
        ready: whether they may be read.
    """

    number: int
    tags: Mapping[str, str]
    created: float = 0.0
    source: str = ""
    ready: bool = True


class RunLog(Protocol):
    """One recovery's run in a tracking server. Methods raise TrackingError."""

    def lacks(self, entry: Entry) -> bool:
        """Whether the server has not got all that the entry tells."""

    def send(self, entry: Entry) -> None:
        """Send it. Sending again what has arrived in part does no harm."""

    def close(self, status: str) -> None:
        """Set RUNNING, FAILED or FINISHED."""


class Registry(Protocol):
    """The versions and aliases of one registered model. Methods raise TrackingError. ``uri`` is fit to be shown."""

    uri: str

    def versions(self) -> list[Version]:
        """All versions, the oldest first; none when the model does not exist."""

    def aliased(self, alias: str) -> int | None:
        """The version that an alias points to."""

    def download_uri(self, version: int) -> str:
        """Where the server keeps a version's files, for sources that it alone can follow (``runs:/``, ``models:/m-``)."""

    def add(self, checkpoint_uri: str, tags: Mapping[str, str], identity: Identity) -> Version:
        """A new version that points to a checkpoint; makes the model where there is none."""

    def remove(self, version: int) -> None:
        """Delete a version. The weights are not touched."""

    def tag(self, version: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""

    def untag(self, version: int, tag: str) -> None:
        """Remove a tag of a version, if it is there."""

    def point(self, alias: str, version: int) -> None:
        """Move an alias, wherever it points now."""

    def unpoint(self, alias: str) -> None:
        """Take an alias away, if it is there."""

    def files(self, version: int) -> list[str]:
        """Names of what the registry itself finds at the top of a version's source."""


class Tracker(Protocol):
    """A tracking server; ``uri`` is fit to be shown."""

    uri: str

    def open(self, identity: Identity, *, injected: bool = True) -> RunLog | None:
        """Find or start the recovery's run. None where nothing is tracked. Raises TrackingError.

        With ``injected`` a run that the environment names goes before one of our own.
        """

    def registry(self, model_name: str) -> Registry | None:
        """The registered model of that name. None where nothing is tracked."""


class NullTracker:
    """No tracking."""

    uri = ""

    def open(self, identity: Identity, *, injected: bool = True) -> None:
        return None

    def registry(self, model_name: str) -> None:
        return None


def tracker_for(settings: Tracking) -> Tracker:
    """The tracker of a recipe: its URI, else MLFLOW_TRACKING_URI, else none. Connects on first use."""
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return NullTracker()
    from camopd.tracking.mlflow_tracker import MlflowTracker

    return MlflowTracker(uri, settings.experiment)


# --- Sync -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SyncResult:
    """Keys of the entries that were sent now, and why some are still missing (empty when none is)."""

    sent: tuple[str, ...] = ()
    problem: str = ""


def sync(run_uri: str, *, store: Store, tracker: Tracker, seconds: float = SYNC_SECONDS) -> SyncResult:
    """Send what the store holds about a run and the tracker lacks. An outage is a warning, never an error.

    Args:
        run_uri: the run's prefix, prepared.
        store: where to read.
        tracker: where to send.
        seconds: after that long no further entry is begun; the next sync goes on from there.
    """
    plan, sent, begun = Plan.load(store, run_uri), [], time.monotonic()
    try:
        run = tracker.open(logbook.identity(plan))
        if run is None:
            return SyncResult()
        for entry in logbook.entries(plan, store):
            if not run.lacks(entry):
                continue
            if time.monotonic() - begun > seconds:
                raise OutageError(f"{tracker.uri} is slow: {entry.key} is not sent after {seconds:.0f} s")
            run.send(entry)
            sent.append(entry.key)
        run.close(logbook.status(plan, store))
    except TrackingError as error:
        log.warning("MLflow lacks a part of this run, which the next sync sends: %s", error)
        return SyncResult(tuple(sent), str(error))
    return SyncResult(tuple(sent))


def log_tick(name: str, place: str, outcome: str, tags: Mapping[str, str], *, tracker: Tracker) -> None:
    """One point more in the run that a schedule has in the tracking server, one for all its ticks. An outage is a warning.

    Args:
        name: of the schedule.
        place: prefix of its records; tells schedules of the same name apart.
        outcome: one of camopd.ticks.OUTCOMES; a series each.
        tags: how it stands after this tick.
        tracker: where to send.
    """
    now = time.time()
    run_id, run_uri = f"schedule {name}", logbook.absolute(place)
    identity = Identity(run_id, run_uri, {"camopd.run_id": run_id, "camopd.run_uri": run_uri, "camopd.schedule": name})
    tags = {"camopd.last_tick": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"), **tags}
    tags = {name: text[: logbook.MAX_TAG_LENGTH] for name, text in tags.items()}
    facts = Facts(tags=tags, points=(Point(f"ticks/{outcome}", 1.0, int(now // 60), round(1000 * now)),))
    try:
        run = tracker.open(identity, injected=False)
        if run is not None:
            run.send(Entry("tick", digest([now, outcome, tags]), lambda: facts))
            run.close("FAILED" if outcome in ("gave-up", "failed") else "FINISHED")
    except TrackingError as error:
        log.warning("MLflow lacks a tick of the schedule %s: %s", name, error)


# --- Where the alias pointed when the run started -------------------------------------------------------------------------


@dataclass(frozen=True)
class AliasAtStart:
    """What an alias pointed to when the run started; ``known`` is False when nobody could say."""

    known: bool
    version: int | None = None


def alias_snapshot(run_uri: str, *, store: Store, tracker: Tracker) -> None:
    """Write down, once a run, where the alias points now; promotion moves it only from there.

    An outage is a warning: then the run does not know, and its promotion leaves the alias alone.
    """
    target = join(run_uri, "registry.json")
    names = Plan.load(store, run_uri).recipe.promote
    registry = tracker.registry(names.model_name)
    if registry is None or store.stat(target) is not None:
        return
    record: dict[str, Any] = {"model_name": names.model_name, "alias": names.alias, "known": True, "version": None}
    try:
        record["version"] = registry.aliased(names.alias)
    except TrackingError as error:
        log.warning("this run will not move the alias %s, since nobody knows where it points now: %s", names.alias, error)
        record["known"] = False
    store.write(target, json.dumps(record, indent=1).encode(), if_absent=True)


def alias_at_start(plan: Plan, store: Store) -> AliasAtStart:
    """What ``alias_snapshot`` wrote; unknown also when it was about another model or alias, or never written."""
    target, names = join(plan.run_uri, "registry.json"), plan.recipe.promote
    if store.stat(target) is None:
        return AliasAtStart(known=False)
    record = json.loads(store.read(target))
    same = (record["model_name"], record["alias"]) == (names.model_name, names.alias)
    return AliasAtStart(known=record["known"] and same, version=record["version"])
