"""Stage 7: register the recovered model, if the gate said yes. The weights stay where they are.

MLflow checks neither that a version's source exists nor where an alias points when it is moved, and it has no compare-and-swap.
What it does give is a number to each version, in order. So: verify every file first; make the version with the tag ``pending``;
stand back while an older version is pending; then compare the alias with what it was when the run started, move it, look again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from camopd.errors import TrackingError
from camopd.evaluate import EVALUATION, evaluation_uri
from camopd.past import known, require_files
from camopd.plan import Plan, checkpoint_uri, training_config
from camopd.store import Store, digest, join
from camopd.tracking import AliasAtStart, OutageError, Registry, Tracker, Version, alias_at_start, logbook
from camopd.tracking.logbook import canonical_text

PROMOTE_SECONDS = 300.0  # how long an unreachable server is tried again
PAUSE_SECONDS = 5.0
PENDING_SECONDS = 900.0  # a version that is pending for longer belongs to a promotion that died

Status = Literal["promoted", "already-promoted", "superseded", "alias-unverified", "refused", "disabled"]


@dataclass(frozen=True)
class Release:
    """What promotion did.

    Attributes:
        status: promoted; already-promoted (an earlier call did it); superseded (a version, but the alias points elsewhere now);
            alias-unverified (a version, but nobody knows where the alias pointed); refused; disabled (nothing is tracked).
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
    """Register the last checkpoint and move the alias; write ``release.json`` with what was done, also when it was nothing.

    May be called again at any time: a version is made once, and an alias that was moved back by hand stays where it is.

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
    evaluation = store.require(evaluation_uri(plan, store)).content_id
    result = json.loads(store.read(join(evaluation_uri(plan, store), EVALUATION)))
    weights = checkpoint_uri(plan.rounds[-1])
    names = plan.recipe.promote
    trained = known(weights, store) or store.require(weights)
    blank = Release("disabled", names.model_name, None, names.alias, logbook.absolute(weights), trained.content_id)

    registry = tracker.registry(names.model_name)
    if not result["decision"]["passed"]:
        release = replace(blank, status="refused", reasons=("the gate said no", *result["decision"]["reasons"]))
    elif not names.enabled:
        release = replace(blank, status="refused", reasons=("promote.enabled is false in the recipe",))
    elif registry is None:
        release = replace(blank, reasons=("no registry: set tracking.uri in the recipe, or MLFLOW_TRACKING_URI",))
    else:
        wish = _Wish(plan, store, registry, blank, _tags(plan, store, blank, evaluation, result))
        release = _patiently(wish.fulfil, seconds=seconds, weights=blank.checkpoint_uri)
    record = json.dumps(asdict(release), indent=1, ensure_ascii=False)
    done_before = release.status == "already-promoted"  # then the record is there already, unless we were killed before it
    store.write(join(release_uri(plan, store), "release.json"), record.encode(), if_absent=done_before)
    return release


def _tags(plan: Plan, store: Store, release: Release, evaluation_id: str, evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What a version says about itself: whose it is, made from what, how good."""
    tags = {
        "camopd.run_id": logbook.identity(plan).run_id,
        "camopd.run_uri": logbook.absolute(plan.run_uri),
        "camopd.content_id": release.content_id,
        "camopd.alias": release.alias,
        "camopd.evaluation": evaluation_id,
        "camopd.settings": digest(training_config(plan.recipe, plan.content_ids)),
    }
    tags |= {f"camopd.content_id.{name}": content_id for name, content_id in plan.content_ids.items()}
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


# --- Who may move the alias (pure) ----------------------------------------------------------------------------------------


def pending(now: float) -> dict[str, str]:
    """Tags of a version whose promotion is under way since ``now`` (seconds since 1970)."""
    return {"camopd.status": "pending", "camopd.since": f"{now:.0f}"}


def rival(mine: Version, versions: Iterable[Version], *, now: float) -> Version | None:
    """An older version of another recovery whose promotion to the same alias is under way."""
    for version in versions:
        tags = version.tags
        other = version.number < mine.number and tags.get("camopd.alias") == mine.tags["camopd.alias"]
        if other and tags.get("camopd.status") == "pending" and now - float(tags.get("camopd.since", 0)) < PENDING_SECONDS:
            return version
    return None


def obstacle(mine: Version, versions: Iterable[Version], start: AliasAtStart, current: int | None, *, now: float) -> str:
    """Why the alias must not be moved to ``mine``, or nothing.

    Args:
        mine: the version to point to.
        versions: all versions of the model, read before ``current``: whoever was pending then may have moved the alias since.
        start: where the alias pointed when the run started.
        current: where it points now.
        now: seconds since 1970.
    """
    known = {version.number: version for version in versions}
    ahead = rival(mine, known.values(), now=now)
    if ahead is not None:
        return f"version {ahead.number} came first and is being promoted"
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
        tags: of the version.
    """

    plan: Plan
    store: Store
    registry: Registry
    release: Release
    tags: Mapping[str, str]

    def fulfil(self) -> Release:
        mine = self._mine()
        if mine is not None and mine.tags.get("camopd.status") == "promoted":
            return replace(self.release, status="already-promoted", version=mine.number)
        require_files(self.release.checkpoint_uri, self.store)
        damage = self.store.verify(self.release.checkpoint_uri, deep=True)
        if damage:
            return replace(self.release, status="refused", reasons=tuple(damage))
        now = pending(time.time())
        if mine is None:
            added = self.registry.add(self.release.checkpoint_uri, {**self.tags, **now}, logbook.identity(self.plan))
            mine = self._mine()
            assert mine is not None, "the version that was added is not there"
            if mine.number != added.number:  # two attempts at once, or a request that was sent again: the first one stays
                self.registry.remove(added.number)
        else:
            self.registry.tag(mine.number, now)
        status, reasons = self._move(mine)
        self.registry.tag(mine.number, {"camopd.status": status})
        return replace(self.release, status=status, version=mine.number, reasons=reasons)

    def _mine(self) -> Version | None:
        """The first version of this run and these weights for this alias."""
        ours = ("camopd.run_id", "camopd.content_id", "camopd.alias")
        same = (v for v in self.registry.versions() if all(v.tags.get(name) == self.tags[name] for name in ours))
        return next(same, None)

    def _move(self, mine: Version) -> tuple[Status, tuple[str, ...]]:
        alias, start = self.release.alias, alias_at_start(self.plan, self.store)
        if not start.known:
            return "alias-unverified", (f"nobody knows where the alias {alias} pointed when the run started; move it by hand",)
        versions = self.registry.versions()
        reason = obstacle(mine, versions, start, self.registry.aliased(alias), now=time.time())
        if reason:
            return "superseded", (reason,)
        self.registry.point(alias, mine.number)
        current = self.registry.aliased(alias)
        if current != mine.number:
            return "superseded", (f"the alias {alias} was moved to version {current} at the same time",)
        return "promoted", ()
