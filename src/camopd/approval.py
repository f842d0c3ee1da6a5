"""What people do with a model's versions: approve one that waits, reject it, roll the one in use back.

Weights are verified before the alias moves, which may take minutes; so the alias is compared with where it was when the person
asked, and whoever comes second is told what the first one did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from camopd.aliases import Move, damage, decided, is_ours, move, withdraw
from camopd.errors import RefusedError
from camopd.history import LEFT, MOVES, STATUS, Actor, Event, Line, events, held_before, lines, now
from camopd.notify import Message, Status, send
from camopd.store import Store
from camopd.tracking import OutageError, Registry, Version
from camopd.tracking.turns import turn

WAITING = ("candidate", "superseded-candidate", "superseded", "alias-unverified")  # passed the gate, and no alias took it
MAX_WHY = 2000  # characters; a tag holds 5,000 in some databases


@dataclass(frozen=True)
class Decision:
    """What was done.

    Attributes:
        version: the version that it is about: approved, rejected, or the one that the alias went back to.
        alias: the alias.
        before: where it pointed before.
        now: where it points now.
        checked: what is known of the weights that it points to, as a sentence; empty where no alias was moved.
    """

    version: Version
    alias: str
    before: int | None
    now: int | None
    checked: str = ""


def approve(
    model: str, registry: Registry, store: Store, actor: Actor, *, version: int | None = None, again: bool = False
) -> Decision:
    """Let the alias point to a version that waits.

    Args:
        model: name of the registered model.
        registry: its versions.
        store: where the weights are.
        actor: who says so, and why.
        version: none means the one that has the candidate's alias.
        again: also one that was rejected or rolled back.

    Raises:
        RefusedError: no such version, or not one that waits; its weights are damaged; somebody else was faster.
        TrackingError: the server did not answer, or refused. Asking again does what is still to be done.
    """
    _check(actor)
    chosen = _chosen(model, _all(model, registry), version)
    alias = _may_be_approved(model, chosen, again=again)
    start = registry.aliased(alias)
    if wrong := damage(chosen, registry, store):
        raise RefusedError(f"version {chosen.number} of {model} is not approved: {'; '.join(wrong)}")

    def obstacle(versions: Sequence[Version], current: int | None) -> str:
        status = _of(model, versions, chosen.number).tags.get(STATUS)
        if status != chosen.tags.get(STATUS):
            return f"it was {status} meanwhile"
        return _moved(alias, start, current, versions) if current != chosen.number else ""

    def then(versions: Sequence[Version]) -> None:
        withdraw(registry, chosen)
        registry.tag(chosen.number, decided(actor, now(versions)))

    if reason := move(registry, Move(alias, chosen.number, "approved", actor), obstacle, then=then):
        raise RefusedError(f"version {chosen.number} of {model} is not approved: {reason}")
    _tell("approved", f"version {chosen.number} was approved", model, chosen, alias, actor)
    return Decision(chosen, alias, start, chosen.number, _whole(chosen))


def reject(model: str, registry: Registry, actor: Actor, *, version: int | None = None) -> Decision:
    """Write down that a version that waits is not wanted; no run and no rollback will make it the one in use.

    Raises:
        RefusedError: no such version, or not one that waits; somebody else was faster.
        TrackingError: the server did not answer, or refused.
    """
    _check(actor)
    chosen = _chosen(model, _all(model, registry), version)
    with turn(registry, chosen.number) as mine:
        versions = registry.versions()
        chosen = _of(model, versions, chosen.number)
        status = chosen.tags.get(STATUS, "not ours")
        if status not in WAITING:
            fix = "; camopd rollback takes the alias from it" if status == "promoted" else ""
            raise RefusedError(f"version {chosen.number} of {model} does not wait: it is {status}{fix}")
        mine.require()
        alias = chosen.tags.get("camopd.candidate_alias", "")
        event = Event(now(versions), "rejected", chosen.number, alias, **vars(actor))
        registry.tag(chosen.number, {**event.tag(), **decided(actor, event.at), STATUS: "rejected"})
        withdraw(registry, chosen)
    _tell("rejected", f"version {chosen.number} was rejected", model, chosen, alias, actor)
    return Decision(chosen, alias, chosen.number, None)


def rollback(
    model: str, registry: Registry, store: Store, actor: Actor, *, alias: str = "champion", to: int | None = None
) -> Decision:
    """Let the alias point to the version that it pointed to before, and never again, by itself, to the one it leaves.

    Args:
        model: name of the registered model.
        registry: its versions.
        store: where the weights are.
        actor: who says so, and why.
        alias: of the version in use.
        to: none means the version that held the alias before, by the model's own history, without those that were rejected or
            rolled back.

    Raises:
        RefusedError: there is none; its weights are damaged (the sentence names the next one whose are not); somebody else was
            faster.
        TrackingError: the server did not answer, or refused. Asked again with ``to``, it does what is still to be done.
    """
    _check(actor)
    versions = _all(model, registry)
    current = registry.aliased(alias)
    if current is None:
        raise RefusedError(f"{model} has no alias {alias}, so there is nothing to roll back; name another with --alias")
    earlier = held_before(versions, alias, current)
    if to is None and not earlier:
        raise RefusedError(f"no version held the alias {alias} of {model} before version {current}; name one with --to")
    chosen = _of(model, versions, earlier[0] if to is None else to)
    left = current if chosen.number != current else _left_unsaid(versions, alias, current)
    if left is None:
        raise RefusedError(f"the alias {alias} of {model} points to version {current} already")
    if is_ours(chosen) and chosen.number not in earlier and (status := chosen.tags.get(STATUS)) != "promoted":
        fix = "approve it, with --again where that was decided before"
        raise RefusedError(f"version {chosen.number} of {model} is {status}, so that nothing goes back to it; {fix}")
    if wrong := damage(chosen, registry, store):
        others = [number for number in earlier if number != chosen.number]
        whole = next((n for n in others if not damage(_of(model, versions, n), registry, store)), None)
        fix = f"version {whole} is whole: --to {whole}" if whole else "no earlier version is whole"
        raise RefusedError(f"version {chosen.number} of {model} cannot be used: {'; '.join(wrong)}; {fix}")

    def then(versions: Sequence[Version]) -> None:
        registry.tag(left, {**decided(actor, now(versions)), STATUS: "rolled-back"})

    wish = Move(alias, chosen.number, "rolled-back", actor, about=left)
    try:
        reason = move(registry, wish, lambda versions, found: _moved(alias, current, found, versions), then=then)
    except OutageError as error:  # the alias may have been moved: going back once more would be one version too far
        raise OutageError(f"{error}; ask again with --to {chosen.number}") from None
    if reason:
        raise RefusedError(f"{model} is not rolled back: {reason}")
    _tell("rolled-back", f"was rolled back from version {left} to {chosen.number}", model, chosen, alias, actor)
    return Decision(chosen, alias, left, chosen.number, _whole(chosen))


def _tell(status: Status, headline: str, model: str, version: Version, alias: str, actor: Actor) -> None:
    """Tell the webhook, if there is one; that never fails what was done."""
    message = Message(
        status,
        headline,
        run=model,
        run_uri=version.tags.get("camopd.run_uri", ""),
        report=version.tags.get("camopd.report", ""),
        model=model,
        version=version.number,
        alias=alias,
        reason=f"{actor.why} ({actor.by})",
    )
    send(message)


def history(model: str, registry: Registry) -> list[Line]:
    """What happened to a model's versions. Raises RefusedError when there is no such model."""
    versions = _all(model, registry)
    aliases = {event.alias for event in events(versions) if event.alias}
    return lines(versions, {alias: registry.aliased(alias) for alias in sorted(aliases)})


# --- What may be done -----------------------------------------------------------------------------------------------------


def _check(actor: Actor) -> None:
    for name, text in (("--by", actor.by), ("--why", actor.why)):
        if not text.strip():
            raise RefusedError(f"{name} is empty; say {'who decides' if name == '--by' else 'why'}, for the history")
        if len(text) > MAX_WHY:
            raise RefusedError(
                f"{name} has {len(text)} characters; {MAX_WHY} are kept, so put the rest elsewhere and link to it"
            )


def _all(model: str, registry: Registry) -> list[Version]:
    versions = registry.versions()
    if not versions:
        raise RefusedError(f"there is no registered model {model!r} with a version; check the name and the tracking URI")
    return versions


def _of(model: str, versions: Sequence[Version], number: int) -> Version:
    for version in versions:
        if version.number == number:
            return version
    raise RefusedError(f"{model} has no version {number}; it has {', '.join(str(version.number) for version in versions)}")


def _chosen(model: str, versions: Sequence[Version], number: int | None) -> Version:
    """The version of that number, else the one candidate."""
    if number is not None:
        return _of(model, versions, number)
    found = [version for version in versions if version.tags.get(STATUS) == "candidate"]
    if len(found) == 1:
        return found[0]
    if found:
        raise RefusedError(f"{model} has several candidates, under different aliases: name one with --version")
    latest = versions[-1]
    what = f"version {latest.number}, the latest, is {latest.tags.get(STATUS, 'not ours')}"
    raise RefusedError(f"{model} has no candidate ({what}); a model that the gate refused has no version at all")


def _may_be_approved(model: str, chosen: Version, *, again: bool) -> str:
    """The alias that a version was made for. Raises RefusedError for one that does not wait."""
    status, name = chosen.tags.get(STATUS), f"version {chosen.number} of {model}"
    if not is_ours(chosen):
        raise RefusedError(
            f"{name} was not made by a recovery, so there is no evidence to approve it on; move the alias in MLflow"
        )
    if status in LEFT and not again:
        who, why = chosen.tags.get("camopd.decided_by", "somebody"), chosen.tags.get("camopd.decided_why", "no reason")
        raise RefusedError(f"{name} was {status} by {who} ({why}); --again approves it all the same")
    if status == "promoted":
        raise RefusedError(f"{name} was promoted already; `camopd rollback {model} --to {chosen.number}` goes back to it")
    if status not in (*WAITING, *LEFT):
        raise RefusedError(f"{name} is {status}: its promotion is under way; wait for it, or run `camopd promote` again")
    return chosen.tags["camopd.alias"]


def _moved(alias: str, start: int | None, current: int | None, versions: Sequence[Version]) -> str:
    """Who was faster, where the alias is not where it was."""
    if current == start:
        return ""
    last = next((e for e in reversed(events(versions)) if e.alias == alias and e.after == current), None)
    who = f" ({last.what} by {last.by}: {last.why})" if last else ""
    return f"the alias {alias} was moved from {_named(start)} to {_named(current)} meanwhile{who}; look at it and ask again"


def _left_unsaid(versions: Sequence[Version], alias: str, current: int) -> int | None:
    """The version that an alias has left for ``current`` without an event: by hand, or by an attempt that was cut off."""
    moves = [event.after for event in events(versions) if event.what in MOVES and event.alias == alias]
    known = [version.number for version in versions]
    return moves[-1] if moves and moves[-1] != current and moves[-1] in known else None


def _named(version: int | None) -> str:
    return "nothing" if version is None else f"version {version}"


def _whole(version: Version) -> str:
    if is_ours(version):
        return "every file of its weights was read and is what was promoted"
    return "its weights are there; nobody knows more of a version that no recovery made"
