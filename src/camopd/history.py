"""Who made which version of a model the one in use, when, and on which evidence. Pure: versions in, events and lines out.

Each event is a tag of its own on the version that it is about, so that two who write at once both stay, and the registry's own
page shows them. Times come from the machine that wrote them, and are put after every event that was there before.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from camopd.tracking import Version

EVENT = "camopd.event."  # + time and a name that nobody else has
STATUS, URI, CONTENT_ID, EXPORT_ID = "camopd.status", "camopd.checkpoint_uri", "camopd.content_id", "camopd.release_content_id"
LEFT = ("rejected", "rolled-back")  # a version of this status is nobody's choice any more

What = Literal["promoted", "candidate", "approved", "rejected", "rolled-back", "superseded"]
MOVES: tuple[What, ...] = ("promoted", "approved", "rolled-back")  # of the alias in use


@dataclass(frozen=True)
class Actor:
    """Who does something and why; ``login`` is the account that it was done from."""

    by: str
    why: str = ""
    login: str = ""


@dataclass(frozen=True)
class Event:
    """Something that happened to a version.

    Attributes:
        at: seconds since 1970.
        what: the kind.
        version: the version it is about.
        alias: the alias that it is about.
        before: where the alias pointed before, where it was moved.
        after: where it points since.
        by: a person, or the run whose gate decided.
        why: in their words.
        login: account.
    """

    at: float
    what: str
    version: int
    alias: str
    before: int | None = None
    after: int | None = None
    by: str = ""
    why: str = ""
    login: str = ""

    def tag(self) -> dict[str, str]:
        """The tag that keeps it: JSON that people can read, under a name that sorts by time."""
        shown = {"what": self.what, "at": stamp(self.at), "alias": self.alias, "from": self.before, "to": self.after}
        shown |= {"by": self.by, "why": self.why, "login": self.login}
        text = json.dumps({name: value for name, value in shown.items() if value not in ("", None)}, ensure_ascii=False)
        moment = datetime.fromtimestamp(self.at, UTC).strftime("%Y%m%dT%H%M%S.%f")[:-3]
        return {f"{EVENT}{moment}Z-{secrets.token_hex(2)}": text}


def stamp(seconds: float) -> str:
    """``2026-11-26T22:43:45.123Z``."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def now(versions: Iterable[Version]) -> float:
    """The time of an event that comes after all that are there, whatever this machine's clock says."""
    latest = max((event.at for event in events(versions)), default=0.0)
    return max(time.time(), latest + 0.001)


def events(versions: Iterable[Version]) -> list[Event]:
    """All events in order of time.

    A version that was promoted before events were kept has one made of its tags: promoted when it was made.
    """
    found = [event for version in versions for event in _of(version)]
    return sorted(found, key=lambda event: event.at)


def _of(version: Version) -> list[Event]:
    texts = [text for tag, text in version.tags.items() if tag.startswith(EVENT)]
    if not texts and version.tags.get(STATUS) == "promoted":
        alias, by = version.tags.get("camopd.alias", ""), version.tags.get("camopd.run_id", "")
        return [Event(version.created, "promoted", version.number, alias, None, version.number, by)]
    return [event for text in texts if (event := _read(version.number, text))]


def _read(version: int, text: str) -> Event | None:
    """None for a tag that somebody has edited so that it tells nothing any more."""
    try:
        record: Mapping[str, Any] = json.loads(text)
        at = datetime.fromisoformat(record["at"]).timestamp()
        words = {name: str(record.get(name, "")) for name in ("what", "alias", "by", "why", "login")}
        return Event(at=at, version=version, before=record.get("from"), after=record.get("to"), **words)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def held_before(versions: Iterable[Version], alias: str, current: int) -> list[int]:
    """The versions that an alias pointed to before, the latest first; without those that are gone, rejected or rolled back."""
    known = {version.number: version for version in versions}
    holders: list[int] = []
    for event in events(known.values()):
        if event.what in MOVES and event.alias == alias:
            holders += [number for number in (event.before, event.after) if number is not None]
    order = dict.fromkeys(reversed(holders))
    return [n for n in order if n != current and n in known and known[n].tags.get(STATUS) not in LEFT]


# --- What is shown --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """An event with the evidence of its version, or a move that nobody of ours made (``what`` is "moved outside").

    Attributes:
        event: what happened.
        scores: name -> value, low, high; see ``scores``.
        run_uri: the recovery that made the version.
        report: its report.
    """

    event: Event
    scores: Mapping[str, tuple[float, ...]]
    run_uri: str = ""
    report: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        event = asdict(self.event) | {"at": stamp(self.event.at)}
        return event | {"scores": self.scores, "run_uri": self.run_uri, "report": self.report}


def scores(tags: Mapping[str, str], prefix: str = "camopd.score.") -> dict[str, tuple[float, ...]]:
    """Name -> value, lower and upper end of the 95 % interval, of what has an interval.

    ``{"recovered_general": "0.61", "recovered_general_low": "0.55", ...} -> {"recovered_general": (0.61, 0.55, 0.70)}``.
    """
    found = {}
    for tag in tags:
        ends = [tags.get(tag + end) for end in ("", "_low", "_high")]
        if tag.startswith(prefix) and all(end not in (None, "none") for end in ends):
            found[tag.removeprefix(prefix)] = tuple(float(end) for end in ends if end is not None)
    return found


def lines(versions: Iterable[Version], aliases: Mapping[str, int | None]) -> list[Line]:
    """The whole history, in order of time.

    Args:
        versions: all versions of the model.
        aliases: where aliases point now. One that has been moved by other means is told as far as it can be: between two events
            of ours, or after the last one.
    """
    known = {version.number: version for version in versions}
    found: list[Line] = []
    points: dict[str, int | None] = {}
    for event in events(known.values()):
        if event.after is not None and event.before is not None and points.get(event.alias, event.before) != event.before:
            found.append(_outside(event.at, event.alias, points[event.alias], event.before))
        if event.what in ("approved", "rejected"):  # it waits no longer
            points = {alias: None if number == event.version else number for alias, number in points.items()}
        if event.after is not None:
            points[event.alias] = event.after
        tags = known[event.version].tags
        found.append(Line(event, scores(tags), tags.get("camopd.run_uri", ""), tags.get("camopd.report", "")))
    for alias, last in points.items():
        if alias in aliases and aliases[alias] != last:
            found.append(_outside(found[-1].event.at, alias, last, aliases[alias]))
    return found


def _outside(at: float, alias: str, before: int | None, after: int | None) -> Line:
    return Line(Event(at, "moved outside", after or before or 0, alias, before, after), {})
