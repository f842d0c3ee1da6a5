"""The one way in which an alias is moved, whoever asks for it: a finished run, an approval, a rollback.

MLflow moves an alias without any check and has no compare-and-swap. So: the weights are verified first, by whoever asks; then,
in a turn that nobody else has (tracking/turns.py), the alias is compared with where it should be, moved, and looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from camopd.history import CONTENT_ID, EXPORT_ID, STATUS, URI, Actor, Event, What, events, now, stamp
from camopd.store import Store
from camopd.tracking import Registry, Version
from camopd.tracking.turns import turn

Then = Callable[[Sequence[Version]], None]
Obstacle = Callable[[Sequence[Version], int | None], str]  # all versions, where the alias points -> why not, or nothing


@dataclass(frozen=True)
class Move:
    """An alias that is to point to a version, and what is written down about it.

    Attributes:
        alias: to move.
        version: where to.
        what: the event.
        actor: whose wish it is.
        status: of the version from then on.
        about: version that the event is about; None is the one that the alias moves to.
    """

    alias: str
    version: int
    what: What
    actor: Actor
    status: str = "promoted"
    about: int | None = None


def move(registry: Registry, wish: Move, obstacle: Obstacle, *, then: Then = lambda versions: None) -> str:
    """Move an alias and write it down, unless there is an obstacle. Returns why not, or nothing.

    Args:
        registry: the model.
        wish: what is to be done; done twice it is written down once.
        obstacle: looks at what is there in the turn in which it is moved.
        then: what else belongs to it, still in the turn; given all versions as they were before.

    Raises:
        TrackingError: the server did not answer or refused. Doing it again does what is still to be done.
    """
    with turn(registry, wish.version) as mine:
        versions = registry.versions()
        current = registry.aliased(wish.alias)
        if reason := obstacle(versions, current):
            return reason
        mine.require()
        registry.point(wish.alias, wish.version)
        found = registry.aliased(wish.alias)
        if found != wish.version:
            return f"the alias {wish.alias} was moved to version {found} at the same time"
        about = wish.version if wish.about is None else wish.about
        before = wish.about if current == wish.version else current  # moved already, by an attempt that was cut off
        event = Event(now(versions), wish.what, about, wish.alias, before, wish.version, **vars(wish.actor))
        if current != wish.version or not _told(versions, event):
            registry.tag(about, event.tag())
        then(versions)
        registry.tag(wish.version, {STATUS: wish.status})  # last: a version that has it is done
    return ""


def _told(versions: Sequence[Version], event: Event) -> bool:
    """Whether an attempt that was cut off has written the event."""
    return any((old.what, old.version, old.after) == (event.what, event.version, event.after) for old in events(versions))


def withdraw(registry: Registry, version: Version) -> None:
    """Take the candidate's alias from a version that waits no longer."""
    alias = version.tags.get("camopd.candidate_alias")
    if alias and version.tags.get(STATUS) == "candidate" and registry.aliased(alias) == version.number:
        registry.unpoint(alias)


def decided(actor: Actor, at: float) -> dict[str, str]:
    """Tags that show the last decision of a person about a version."""
    shown = {"camopd.decided_by": actor.by, "camopd.decided_why": actor.why, "camopd.decided_at": stamp(at)}
    return {name: text for name, text in shown.items() if text}


def is_ours(version: Version) -> bool:
    return URI in version.tags and CONTENT_ID in version.tags


def damage(version: Version, registry: Registry, store: Store) -> list[str]:
    """What is wrong with a version's weights: every file is read and compared with the manifest, which is the promoted one's.

    Of a version that was not made by a recovery nobody knows what its files should be: there it is looked whether the registry
    finds any.
    """
    if not is_ours(version):
        return (
            [] if registry.files(version.number) else [f"the registry finds no file at the source of version {version.number}"]
        )
    place = version.tags[URI]
    manifest = store.manifest(place)
    if manifest is None:
        return [f"{place} is not there any more"]
    if manifest.content_id != version.tags.get(EXPORT_ID, version.tags[CONTENT_ID]):
        return [f"{place} holds other weights than those that were promoted"]
    return list(store.verify(place, deep=True))
