"""What of an output folder may go, and why the rest stays. Pure: no files, no network, no clock.

A run that is finished keeps its evidence (plan, evaluation, release, records) and its last checkpoint; the tables between the
stages and the checkpoints before the last go. A run that is not finished keeps all, since the same command goes on from there,
or goes as a whole where that was asked for. Nothing goes that a registry version or another run refers to, that somebody else
put there, or that may be at work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from camopd.past import COLLECTED
from camopd.store import MANIFEST, Manifest, join
from camopd.store.sweeper import Found

HOUR, DAY = 3600.0, 86400.0
WINDOW = DAY  # a run that was written to so recently may be at work
LONGEST_STAGE = 7 * DAY  # a stage that has begun and left no end may be at work for so long without a file

Kind = Literal["table", "shard", "partial", "checkpoint", "prompts", "evidence"]
State = Literal["running", "finished", "stopped", "unfinished", "not understood"]
Checkpoints = Literal["last", "none"]

_ROUND = r"rounds/(?P<round>\d{4,})/"
_UNITS: dict[Kind, re.Pattern[str]] = {
    "table": re.compile(rf"({_ROUND}(?:rollout|select|score-[^/]+))/(.+)"),
    "shard": re.compile(rf"({_ROUND}shards/(?:rollout|score-[^/]+)-\d+-of-\d+)/(.+)"),
    "partial": re.compile(rf"({_ROUND}train-partial/[0-9a-f]{{12}}/\d{{4,}})/(.+)"),
    "checkpoint": re.compile(rf"({_ROUND}train)/(.+)"),
    "prompts": re.compile(r"(teacher-prompts-[^/]+)/(.+)"),
    "evidence": re.compile(r"(plan|evaluation/[^/]+|release/[^/]+/model)/(.+)"),
}
_TABLES = re.compile(r"(rollouts|scored|selection|prompts)\.parquet|summary\.json")
_MODEL = re.compile(
    r"(trainer/(adapter/)?)?([\w.-]+\.(safetensors|jinja|txt|model)|[\w.-]+\.safetensors\.index\.json"
    r"|((adapter_|generation_|tokenizer_)?config|tokenizer|special_tokens_map|added_tokens|vocab|state|steps|processor_config)\.json)"
)
# What else a run's folder holds, by name; the records of each kind are JSON.
_RECORDS = re.compile(
    r"(recipe|registry|stop|error)\.json|settings\.md|release/[^/]+/release\.json|(attempts|cut-off|failed|notified)/[^/]+\.json"
    rf"|{_ROUND}train-failure\.json|(rounds/\d{{4,}}/(?:shards/)?)?{COLLECTED}/[^/]+\.json"
)
_SCRATCH = re.compile(r"(.*/)?\.camopd-[^/]+(/.*)?")  # what a killed process left half-written in a local folder


@dataclass(frozen=True)
class Unit:
    """A prefix of a run that is made and removed as a whole.

    Attributes:
        name: relative to the run: ``rounds/0001/train``.
        kind: what it is.
        round: number of the round, or 0.
        files: what lies there now, names relative to the unit.
    """

    name: str
    kind: Kind
    round: int
    files: tuple[Found, ...]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Run:
    """A run's folder as it was found.

    Attributes:
        name: of the folder, ``<recipe's name>-<12 hex digits>``.
        uri: its location, fit to be compared with those of references.
        files: everything in it.
        settings: content of recipe.json; None where it is not one of ours.
        manifests: by unit, of those that are finished.
        records: by unit, of those that were removed before.
        begun: when a stage began that has left no end, in seconds since 1970; 0 for none.
        released: locations that its release.json names for a version.
        content_ids: of the run's inputs, from its plan.
    """

    name: str
    uri: str
    files: tuple[Found, ...]
    settings: Mapping[str, Any] | None
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    records: Mapping[str, Manifest] = field(default_factory=dict)
    begun: float = 0.0
    released: tuple[str, ...] = ()
    content_ids: frozenset[str] = frozenset()

    @property
    def newest(self) -> float:
        """When a stage last wrote a file, in seconds since 1970; the records of an earlier removal do not count."""
        return max((file.modified for file in self.files if not is_record_of_removal(file.name)), default=0.0)

    @cached_property
    def units(self) -> list[Unit]:
        return units_of(self.files)

    @cached_property
    def strangers(self) -> list[str]:
        """Files that no stage wrote, as far as names and manifests tell."""
        return sorted([*loose_strangers(self.files), *(name for unit in self.units for name in self.strangers_in(unit))])

    def strangers_in(self, unit: Unit) -> list[str]:
        """Files of a unit that nobody of ours wrote: not in its manifest, or without one not of a name that its stage gives."""
        made = self.manifests.get(unit.name) or self.records.get(unit.name)
        known = {MANIFEST, *(file.name for file in made.files)} if made else {MANIFEST}
        likely = _MODEL if unit.kind in ("checkpoint", "partial", "evidence") else _TABLES
        names = [file.name for file in unit.files if file.name not in known]
        return [f"{unit.name}/{name}" for name in names if made or not likely.fullmatch(name)]

    def known(self, name: str) -> Manifest | None:
        """The manifest of a unit, also of one that was removed."""
        return self.manifests.get(name) or self.records.get(name)


def is_record_of_removal(name: str) -> bool:
    """Whether a run's file is a manifest that outlived its prefix (past.py)."""
    return f"/{COLLECTED}/" in f"/{name}"


def units_of(files: Iterable[Found]) -> list[Unit]:
    """The units that files of a run belong to, by name."""
    found: dict[str, tuple[Kind, int, list[Found]]] = {}
    for file in files:
        for kind, pattern in _UNITS.items():
            if match := pattern.fullmatch(file.name):
                name, number = match[1], int(match.groupdict().get("round") or 0)
                own = Found(file.name[len(name) + 1 :], file.size, file.modified)
                found.setdefault(name, (kind, number, []))[2].append(own)
    return [Unit(name, kind, number, tuple(own)) for name, (kind, number, own) in sorted(found.items())]


def loose_strangers(files: Iterable[Found]) -> list[str]:
    """Files outside of every unit that are none of a run's records."""
    patterns = (*_UNITS.values(), _RECORDS, _SCRATCH)
    return [file.name for file in files if not any(pattern.fullmatch(file.name) for pattern in patterns)]


# --- What refers to what --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Something that somebody still needs.

    Attributes:
        by: who, in words: ``version 3 of icd-coder``.
        location: a prefix or a file, normalised as ``Run.uri`` is; or empty.
        content_id: identity of the content; or empty.
        owner: name of the run that refers, if it is one: a run needs no protection from itself.
    """

    by: str
    location: str = ""
    content_id: str = ""
    owner: str = ""


def needs_unit(reference: Reference, run: Run, unit: Unit) -> bool:
    """Whether a reference is about this unit: its place, a file in it, a folder of the run around it, or its content."""
    if reference.owner == run.name:
        return False
    place = join(run.uri, unit.name)
    made = run.manifests.get(unit.name)
    same = made is not None and reference.content_id == made.content_id
    inside = is_within(reference.location, run.uri) and reference.location != run.uri
    return same or (inside and (is_within(reference.location, place) or is_within(place, reference.location)))


def needs_run(reference: Reference, run: Run) -> bool:
    """Whether a reference is about a run or anything in it."""
    if reference.owner == run.name:
        return False
    return is_within(reference.location, run.uri) or any(needs_unit(reference, run, unit) for unit in run.units)


def is_within(location: str, place: str) -> bool:
    """``s3://b/run/x`` is within ``s3://b/run``, ``s3://b/running`` is not."""
    return bool(location) and (location == place or location.startswith(place + "/"))


# --- The decision ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """What somebody asked for.

    Attributes:
        older_than: seconds since a run's last file was written; younger runs stay as they are.
        keep_last: of each recipe's name, so many of the newest runs stay as they are.
        checkpoints: of a finished run, the ``last`` one stays, or ``none``.
        whole_runs: remove runs as a whole that stopped, failed or were abandoned.
    """

    older_than: float = 30 * DAY
    keep_last: int = 0
    checkpoints: Checkpoints = "last"
    whole_runs: bool = False


@dataclass(frozen=True)
class Verdict:
    """What becomes of a run.

    Attributes:
        run: the run.
        state: what it is.
        removes: units that go.
        whole: everything goes, the evidence included.
        keeps: why the rest stays, a sentence each.
    """

    run: Run
    state: State
    removes: tuple[Unit, ...] = ()
    whole: bool = False
    keeps: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """What would be free afterwards."""
        return sum(file.size for file in self.run.files) if self.whole else sum(unit.bytes for unit in self.removes)


def state_of(run: Run, now: float) -> State:
    """What a run is. ``finished`` is one whose last round, as its recipe has it now, is evaluated, and released or refused."""
    if run.settings is None:
        return "not understood"
    if now - run.newest < WINDOW or (run.begun and now - run.begun < LONGEST_STAGE):
        return "running"
    names = {file.name for file in run.files}
    if "stop.json" in names:
        return "stopped"
    last = run.known(f"rounds/{run.settings['num_rounds']:04d}/train")
    evaluations = [made for name, made in run.manifests.items() if name.startswith("evaluation/")]
    decided = [made for made in evaluations if last is not None and made.inputs.get("after") == last.content_id]
    released = any(name.startswith("release/") and name.endswith("/release.json") for name in names)
    is_done = any(released or not made.metrics.get("passed", 1) for made in decided)
    return "finished" if is_done else "unfinished"


def decide(runs: Sequence[Run], references: Sequence[Reference], policy: Policy, now: float) -> list[Verdict]:
    """What becomes of each run.

    Args:
        runs: of one output.
        references: to anything in it, those of the runs themselves included.
        policy: what was asked for.
        now: seconds since 1970.
    """
    spared = _newest(runs, policy.keep_last)
    return [_verdict(run, references, policy, now, is_spared=run.name in spared) for run in runs]


def _newest(runs: Iterable[Run], count: int) -> set[str]:
    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        by_recipe.setdefault(run.name.rpartition("-")[0], []).append(run)
    newest = (sorted(own, key=lambda run: run.newest, reverse=True)[:count] for own in by_recipe.values())
    return {run.name for own in newest for run in own}


def _verdict(run: Run, references: Sequence[Reference], policy: Policy, now: float, *, is_spared: bool) -> Verdict:
    state, age = state_of(run, now), now - run.newest
    if state == "not understood":
        return Verdict(run, state, keeps=("its recipe.json is not one of this version",))
    if state == "running":
        return Verdict(run, state, keeps=(f"may be at work: {_why_running(run, now)}",))
    if age < policy.older_than:
        return Verdict(run, state, keeps=(f"younger than {in_days(policy.older_than)} (--older-than)",))
    if is_spared:
        return Verdict(run, state, keeps=(f"one of the newest {policy.keep_last} of its recipe (--keep-last)",))
    if state == "finished":
        return _finished(run, references, policy)
    if not policy.whole_runs:
        return Verdict(run, state, keeps=("not finished: the same command goes on from here; --whole-runs removes it",))
    if run.strangers:
        return Verdict(run, state, keeps=(f"holds what is not ours: {_some(run.strangers)}",))
    if needed := [reference.by for reference in references if needs_run(reference, run)]:
        return Verdict(run, state, keeps=(f"needed by {_some(sorted(set(needed)))}",))
    if run.released:
        return Verdict(run, state, keeps=("its release.json names a registry version",))
    return Verdict(run, state, whole=True)


def _finished(run: Run, references: Sequence[Reference], policy: Policy) -> Verdict:
    assert run.settings is not None, "a finished run is understood"
    last, removes, keeps = run.settings["num_rounds"], [], dict[str, None]()
    for unit in run.units:
        if unit.kind == "evidence":
            continue
        # The prompts that a teacher made up are an input of further rounds, as the last checkpoint is.
        goes_on = unit.kind == "prompts" or (unit.kind == "checkpoint" and unit.round >= last)
        needed = sorted({reference.by for reference in references if needs_unit(reference, run, unit)})
        released = any(is_within(place, join(run.uri, unit.name)) for place in run.released)
        if strangers := run.strangers_in(unit):
            keeps[f"{unit.name} holds what is not ours: {_some(strangers)}"] = None
        elif needed:
            keeps[f"{unit.name} is needed by {_some(needed)}"] = None
        elif released:
            keeps[f"{unit.name} is what a registry version was made of (release.json)"] = None
        elif goes_on and policy.checkpoints == "last":
            keeps["the last checkpoint and what further rounds need (--checkpoints none removes it)"] = None
        else:
            removes.append(unit)
    keeps["plan, evaluation, release and records: the evidence"] = None
    return Verdict(run, "finished", tuple(removes), keeps=tuple(keeps))


def _why_running(run: Run, now: float) -> str:
    if now - run.newest < WINDOW:
        return f"written to {in_days(now - run.newest)} ago"
    return f"a stage began {in_days(now - run.begun)} ago and has not ended"


def _some(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def in_days(seconds: float) -> str:
    """``40 min``, ``5 h``, ``31 d``."""
    if seconds < HOUR:
        return f"{max(seconds, 0) / 60:.0f} min"
    return f"{seconds / HOUR:.0f} h" if seconds < 2 * DAY else f"{seconds / DAY:.0f} d"
