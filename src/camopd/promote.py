"""Stage 7: register the recovered model, if the gate said yes.

Verify every file first, make the version with the status ``pending``, and only then, where the policy says so, move the alias
(aliases.py): from where it was when the run started, or not at all. With policy ``manual`` the version waits for a person
(approval.py) under an alias of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from camopd.aliases import Move, damage, move, withdraw
from camopd.errors import DamagedError, MissingError, TrackingError
from camopd.evaluate import EVALUATION, REPORT, evaluation_uri
from camopd.export import export, export_uri
from camopd.history import CONTENT_ID, EXPORT_ID, LEFT, STATUS, URI, Actor, Event, now
from camopd.past import known
from camopd.plan import Plan, checkpoint_uri, training_config
from camopd.store import Store, digest, join
from camopd.tracking import AliasAtStart, OutageError, Registry, Tracker, Version, alias_at_start, logbook
from camopd.tracking.logbook import canonical_text

PROMOTE_SECONDS = 300.0  # how long an unreachable server is tried again
PAUSE_SECONDS = 5.0

Status = Literal[
    "promoted", "already-promoted", "candidate", "superseded-candidate", "superseded", "alias-unverified", "rejected",
    "rolled-back", "refused", "disabled",
]  # fmt: skip
SETTLED = ("candidate", "superseded-candidate", *LEFT)  # a run that is started again leaves such a version as it is


@dataclass(frozen=True)
class Release:
    """What promotion did.

    Attributes:
        status: promoted; already-promoted (an earlier call did it, or a person since); candidate (it waits for a person);
            superseded-candidate (a newer one waits); superseded (a version, but the alias points elsewhere now);
            alias-unverified (a version, but nobody knows where the alias pointed); rejected, rolled-back (a person did that
            since); refused; disabled (nothing is tracked).
        model_name: registered model.
        version: number of the version, or None.
        alias: alias that was to move.
        checkpoint_uri: where the weights are.
        content_id: identity of the weights.
        reasons: sentences on the status.
    """

    status: Status
    model_name: str
    version: int | None
    alias: str
    checkpoint_uri: str
    content_id: str
    reasons: tuple[str, ...] = ()


def release_uri(plan: Plan, store: Store) -> str:
    """Prefix of the release that belongs to the recipe's evaluation, model name and alias."""
    names = plan.recipe.promote.model_dump(include={"model_name", "alias"})
    return join(plan.run_uri, "release", digest([evaluation_uri(plan, store), names]).removeprefix("sha256:")[:8])


def run(run_uri: str, *, store: Store, tracker: Tracker, seconds: float = PROMOTE_SECONDS) -> Release:
    """Export the last checkpoint, register it, and move the alias; write ``release.json`` with what was done, if only nothing.

    May be called again at any time: a version is made once, and an alias that was moved back stays where it is.

    Args:
        run_uri: the run's prefix, evaluated.
        store: where to read and write.
        tracker: whose registry.
        seconds: how long to try again while the server is out of reach.

    Raises:
        StoreError: the run is not evaluated.
        TrackingError: the server did not answer in time, or refused. The weights are safe.
    """
    plan = Plan.load(store, run_uri)
    result = json.loads(store.read(join(evaluation_uri(plan, store), EVALUATION)))
    weights = checkpoint_uri(plan.rounds[-1])
    wanted = plan.recipe.promote
    alias = wanted.candidate_alias if wanted.policy == "manual" else wanted.alias
    trained = known(weights, store) or store.require(weights)
    blank = Release("disabled", wanted.model_name, None, alias, logbook.absolute(weights), trained.content_id)

    registry = tracker.registry(wanted.model_name)
    if not result["decision"]["passed"]:
        release = replace(blank, status="refused", reasons=("the gate said no", *result["decision"]["reasons"]))
    elif wanted.policy == "never":
        release = replace(blank, status="refused", reasons=("promote.policy is never in the recipe, or output_promote is off",))
    elif registry is None:
        release = replace(blank, reasons=("no registry: set tracking.uri in the recipe, or MLFLOW_TRACKING_URI",))
    else:
        release = _patiently(_Wish(plan, store, registry, blank, result).fulfil, seconds=seconds, weights=blank.checkpoint_uri)
    place = join(release_uri(plan, store), "release.json")
    if release.status != "already-promoted" or not _is_promoted(store, place):  # a person may have approved it since
        store.write(place, json.dumps(asdict(release), indent=1, ensure_ascii=False).encode())
    return release


def _is_promoted(store: Store, place: str) -> bool:
    return store.stat(place) is not None and json.loads(store.read(place))["status"] == "promoted"


def _tags(plan: Plan, store: Store, release: Release, evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What a version says about itself: whose it is, made from what, how good."""
    identity, evaluated = logbook.identity(plan), evaluation_uri(plan, store)
    tags = {
        "camopd.run_id": identity.run_id,
        "camopd.run_uri": logbook.absolute(plan.run_uri),
        "camopd.policy": plan.recipe.promote.policy,
        "camopd.alias": plan.recipe.promote.alias,
        "camopd.candidate_alias": plan.recipe.promote.candidate_alias,
        "camopd.evaluation": store.require(evaluated).content_id,
        "camopd.report": logbook.absolute(join(evaluated, REPORT)),
        "camopd.settings": digest(training_config(plan.recipe, plan.content_ids)),
        CONTENT_ID: release.content_id,
        EXPORT_ID: store.require(release.checkpoint_uri).content_id,
    }
    code = {"camopd.version": "camopd.version", "mlflow.source.git.commit": "camopd.git_sha"}
    code |= {name: name for name in logbook.ATTEMPT_TAGS}
    tags |= {name: identity.tags[told] for told, name in code.items() if told in identity.tags}
    tags |= {f"camopd.content_id.{name}": content_id for name, content_id in plan.content_ids.items()}
    tags |= {f"camopd.source.{name}": source for name, source in plan.recipe.sources.items()}
    if plan.recipe.train.lora and plan.recipe.train.lora.output == "adapter":
        base = logbook.absolute(plan.weights(plan.recipe.student, store).base)
        tags |= {"camopd.kind": "lora-adapter", "camopd.base_uri": base, "camopd.base_content_id": plan.base_id["base"]}
    return tags | {f"camopd.score.{name}": canonical_text(value) for name, value in evaluation["headline"].items()}


def _patiently(act: Callable[[], Release], *, seconds: float, weights: str) -> Release:
    """Do it, again and again while the server is out of reach, which every step of it allows."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return act()
        except TrackingError as error:
            pause = min(PAUSE_SECONDS, seconds / 10)
            if not isinstance(error, OutageError) or time.monotonic() + pause > deadline:
                safe = f"The weights are safe at {weights}; run `camopd promote` again later"
                raise TrackingError(f"the promotion could not be finished: {error}. {safe}") from None
            time.sleep(pause)


def obstacle(mine: Version, versions: Sequence[Version], start: AliasAtStart, current: int | None) -> str:
    """Why the alias must not be moved to ``mine``, or nothing.

    Args:
        mine: the version to point to.
        versions: all versions of the model.
        start: where the alias pointed when the run started.
        current: where it points now.
    """
    known = {version.number: version for version in versions}
    status = known[mine.number].tags.get(STATUS) if mine.number in known else "deleted"
    if status in (*LEFT, "deleted"):
        return f"version {mine.number} was {status} meanwhile"
    own = current in known and known[current].tags.get("camopd.run_id") == mine.tags["camopd.run_id"]  # fewer rounds, earlier
    if current in (mine.number, start.version) or own:
        return ""
    was = "nothing" if start.version is None else f"version {start.version}"
    return f"the alias {mine.tags['camopd.alias']} points to version {current} now, and to {was} when the run started"


# --- Doing it -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wish:
    """A checkpoint that is to become a version with an alias. Each step looks at what is there first.

    Attributes:
        plan: the run.
        store: where the weights are.
        registry: the registered model.
        release: what to report, still blank.
        evaluation: content of evaluation.json.
    """

    plan: Plan
    store: Store
    registry: Registry
    release: Release
    evaluation: Mapping[str, Any]

    def fulfil(self) -> Release:
        mine = self._mine()
        status: Any = mine.tags.get(STATUS) if mine else None
        if mine and status == "promoted":
            return replace(self._of(mine), status="already-promoted", alias=self.plan.recipe.promote.alias)
        if mine and (status in LEFT or (status in SETTLED and self._is_manual)):
            return replace(self._of(mine), status=status, reasons=_told(mine))
        if wrong := damage(mine, self.registry, self.store) if mine else self._export():
            return replace(self.release, status="refused", reasons=tuple(wrong))
        mine = mine or self._add()
        status, reasons = self._offer(mine) if self._is_manual else self._move(mine)
        return replace(self._of(mine), status=status, reasons=reasons)

    @property
    def _is_manual(self) -> bool:
        return self.plan.recipe.promote.policy == "manual"

    def _of(self, mine: Version) -> Release:
        return replace(self.release, version=mine.number, checkpoint_uri=mine.tags[URI])

    def _mine(self) -> Version | None:
        """The first version of this run and these weights for this alias."""
        ours = {
            "camopd.run_id": logbook.identity(self.plan).run_id,
            "camopd.alias": self.plan.recipe.promote.alias,
            CONTENT_ID: self.release.content_id,
        }
        same = (v for v in self.registry.versions() if all(v.tags.get(name) == text for name, text in ours.items()))
        return next(same, None)

    def _export(self) -> Sequence[str]:
        """Make the export, or read every file of the one that is there; what is wrong with it."""
        place = release_uri(self.plan, self.store)
        if self.store.manifest(export_uri(place)) is not None:
            return self.store.verify(export_uri(place), deep=True)
        try:
            export(self.plan, place, self.store)
        except (DamagedError, MissingError) as error:
            return [str(error)]
        return ()

    def _add(self) -> Version:
        """A version with the status pending, the first of those that several attempts have made."""
        exported = logbook.absolute(export_uri(release_uri(self.plan, self.store)))
        tags = _tags(self.plan, self.store, replace(self.release, checkpoint_uri=exported), self.evaluation)
        added = self.registry.add(exported, {**tags, STATUS: "pending"}, logbook.identity(self.plan))
        mine = self._mine()
        assert mine is not None, "the version that was added is not there"
        if mine.number != added.number:  # two attempts at once, or a request that was sent again
            self.registry.remove(added.number)
        return mine

    @property
    def _actor(self) -> Actor:
        return Actor(logbook.identity(self.plan).run_id, "the gate said yes")

    def _move(self, mine: Version) -> tuple[Status, tuple[str, ...]]:
        """Policy auto: the alias goes to the version, if it is where it was when the run started."""
        alias, start = self.plan.recipe.promote.alias, alias_at_start(self.plan, self.store)
        if not start.known:
            fix = f"look at both, then `camopd approve {self.release.model_name} --version {mine.number}`"
            reason = f"nobody knows where the alias {alias} pointed when the run started; {fix}"
            return self._left("alias-unverified", mine, reason)
        reason = move(
            self.registry,
            Move(alias, mine.number, "promoted", self._actor),
            lambda versions, current: obstacle(mine, versions, start, current),
            then=lambda versions: withdraw(self.registry, mine),
        )
        return self._left("superseded", mine, reason) if reason else ("promoted", ())

    def _offer(self, mine: Version) -> tuple[Status, tuple[str, ...]]:
        """Policy manual: the version waits under the candidate's alias, in place of an older one."""
        alias = self.plan.recipe.promote.candidate_alias

        def newer(versions: Sequence[Version], current: int | None) -> str:
            later = current is not None and current > mine.number
            return f"version {current}, which is newer, has the alias {alias}" if later else ""

        def retire(versions: Sequence[Version]) -> None:
            for other in versions:
                waits = other.tags.get(STATUS) == "candidate" and other.tags.get("camopd.candidate_alias") == alias
                if waits and other.number != mine.number:
                    self._left("superseded-candidate", other, f"version {mine.number} waits in its place")

        wish = Move(alias, mine.number, "candidate", self._actor, status="candidate")
        reason = move(self.registry, wish, newer, then=retire)
        return self._left("superseded-candidate", mine, reason) if reason else ("candidate", _next(self.release, mine))

    def _left(self, status: Status, version: Version, reason: str) -> tuple[Status, tuple[str, ...]]:
        """Write down, once, that a version has no alias, and why."""
        if version.tags.get(STATUS) != status:
            alias = self.plan.recipe.promote.alias
            event = Event(now(self.registry.versions()), "superseded", version.number, alias, by=self._actor.by, why=reason)
            self.registry.tag(version.number, {**event.tag(), STATUS: status})
        return status, (reason,)


def _told(mine: Version) -> tuple[str, ...]:
    """What people have said of a version that is left as it is."""
    who, why = mine.tags.get("camopd.decided_by"), mine.tags.get("camopd.decided_why")
    return (f"{mine.tags[STATUS]} by {who}: {why}",) if who else ()


def _next(release: Release, mine: Version) -> tuple[str, ...]:
    """What there is to do about a version that waits."""
    return (f"it waits: `camopd approve {release.model_name} --version {mine.number} --by YOU --why TEXT`, or reject",)
