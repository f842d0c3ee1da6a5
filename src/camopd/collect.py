"""What lies below an output folder, who refers to it, and its removal: the part of `camopd gc` that looks and acts.

What goes is decided elsewhere (retention.py). Each unit is looked at once more right before it goes, a record of its manifest
stays (past.py), and its manifest goes first: killed at any moment, the next `camopd gc` goes on, and no stage finds half of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from camopd.errors import CamopdError, MissingError, StoreError
from camopd.past import COLLECTED, record_uri
from camopd.retention import WINDOW, Policy, Reference, Run, Unit, Verdict, is_record_of_removal, units_of
from camopd.store import MANIFEST, Manifest, Store, join, parent
from camopd.store.sweeper import Found, Upload
from camopd.tracking.references import locations_in, normalised

_RUN = re.compile(r".+-[0-9a-f]{12}")
_JOB = re.compile(r"jobs/([\w.-]+|notified/[0-9a-f]{12})\.json")
_NEEDED = ("student", "branches", "num_rounds", "tracking", "output")  # without these a recipe.json is none of ours


@dataclass(frozen=True)
class Inventory:
    """What lies below an output.

    Attributes:
        output: its location, normalised.
        runs: every folder with a recipe.json and a run's name.
        jobs: records of pipeline runs, by name relative to the output.
        others: names at the top that are none of these; nobody touches them.
        uploads: multipart uploads in the runs' own places that nobody has ended for ``WINDOW``; names relative to the output.
    """

    output: str
    runs: tuple[Run, ...]
    jobs: tuple[Found, ...]
    others: tuple[str, ...]
    uploads: tuple[Upload, ...]


# --- Looking --------------------------------------------------------------------------------------------------------------


def look(output: str, store: Store, now: float) -> Inventory:
    """Everything below an output.

    Raises:
        StoreError: it is not there, or it is a run itself.
    """
    output = normalised(output)
    sweeper = store.sweeper(output)
    by_top: dict[str, list[Found]] = {}
    for file in sweeper.survey(output):
        top, slash, rest = file.name.partition("/")
        by_top.setdefault(top if slash else "", []).append(replace(file, name=rest if slash else file.name))
    if not by_top:
        raise MissingError(f"{output}: nothing is there; give the folder or prefix that the recipes name as output")
    if "recipe.json" in {file.name for file in by_top.get("", ())}:
        raise StoreError(f"{output} is a run; give the folder above it")
    tops = {name: files for name, files in by_top.items() if _RUN.fullmatch(name) and _has(files, "recipe.json")}
    runs = tuple(read_run(name, join(output, name), files, store) for name, files in sorted(tops.items()))
    jobs = tuple(
        replace(file, name=f"jobs/{file.name}") for file in by_top.get("jobs", ()) if _JOB.fullmatch(f"jobs/{file.name}")
    )
    others = sorted({*(name for name in by_top if name), *(file.name for file in by_top.get("", ()))} - {*tops, "jobs"})
    dead = [upload for upload in sweeper.uploads(output) if now - upload.begun > WINDOW and _is_ours(upload, tops)]
    return Inventory(output, runs, jobs, tuple(others), tuple(dead))


def _has(files: Iterable[Found], name: str) -> bool:
    return any(file.name == name for file in files)


def _is_ours(upload: Upload, runs: Iterable[str]) -> bool:
    top, _, rest = upload.name.partition("/")
    return top in runs and bool(units_of([Found(rest, 0, 0.0)]))


def read_run(name: str, uri: str, files: Sequence[Found], store: Store) -> Run:
    """A run's folder with what its small files say."""
    names = {file.name for file in files}
    units = [unit.name for unit in units_of(files)]
    manifests = {unit: made for unit in units if f"{unit}/{MANIFEST}" in names and (made := _manifest(join(uri, unit), store))}
    past = (file for file in names if is_record_of_removal(file))
    records = {_recorded(file): made for file in past if (made := _record(join(uri, file), store))}
    settings = _json(join(uri, "recipe.json"), store)
    plan = _json(join(uri, "plan", "plan.json"), store) if "plan/plan.json" in names else {}
    attempts = [_json(join(uri, file), store) for file in names if file.startswith("attempts/") and file.endswith(".json")]
    releases = [_json(join(uri, file), store) for file in names if re.fullmatch(r"release/[^/]+/release\.json", file)]
    return Run(
        name=name,
        uri=uri,
        files=tuple(files),
        settings=settings if _is_recipe(settings) else None,
        manifests=manifests,
        records=records,
        begun=max((float(one.get("time", 0)) for one in attempts if one.get("state") == "begun"), default=0.0),
        released=tuple(normalised(str(one.get("checkpoint_uri", ""))) for one in releases if one.get("version") is not None),
        content_ids=frozenset(plan.get("content_ids", {}).values()),
    )


def _is_recipe(settings: dict[str, Any]) -> bool:
    return all(key in settings for key in _NEEDED) and isinstance(settings["num_rounds"], int)


def _manifest(uri: str, store: Store) -> Manifest | None:
    with suppress(StoreError):  # a broken one tells nothing: what lies there counts as a stranger's unless its names are ours
        return store.manifest(uri)
    return None


def _record(uri: str, store: Store) -> Manifest | None:
    with suppress(StoreError, ValueError, TypeError):
        return Manifest.from_json(store.read(uri))
    return None


def _recorded(file: str) -> str:
    """``rounds/0001/collected/train.json -> rounds/0001/train``."""
    return file.replace(f"{COLLECTED}/", "").removesuffix(".json")


def _json(uri: str, store: Store) -> dict[str, Any]:
    with suppress(ValueError, MissingError):
        found = json.loads(store.read(uri))
        return found if isinstance(found, dict) else {}
    return {}


# --- Who refers to it -----------------------------------------------------------------------------------------------------


def references_of(runs: Iterable[Run]) -> list[Reference]:
    """What the runs themselves need: every location in their recipes, and the content of their inputs."""
    found = []
    for run in runs:
        by = f"run {run.name}"
        places = {place for key, value in (run.settings or {}).items() if key != "output" for place in locations_in(value)}
        found += [Reference(by, location=place, owner=run.name) for place in sorted(places)]
        found += [Reference(by, content_id=content_id, owner=run.name) for content_id in sorted(run.content_ids)]
    return found


def references_in_registry(runs: Iterable[Run]) -> list[Reference]:
    """What the versions of every registry that the runs may have written to point to.

    Raises:
        CamopdError: one cannot be asked, or nobody knows where it is: nothing may be removed then.
    """
    from camopd.tracking.mlflow_tracker import MlflowTracker
    from camopd.tracking.references import version_references

    default = os.environ.get("MLFLOW_TRACKING_URI", "")
    asked = {((run.settings or {}).get("tracking") or {}).get("uri") or default for run in runs}
    if "" in asked:
        fix = "set MLFLOW_TRACKING_URI, or give --no-registry if there is none"
        raise CamopdError(f"nobody knows which registry may refer to these runs: {fix}")
    return [found for uri in sorted(asked) for found in version_references(MlflowTracker(uri, "camopd"))]


# --- Removing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removed:
    """What was removed, or why it was not after all."""

    what: str
    bytes: int = 0
    problem: str = ""


def sweep(found: Inventory, verdicts: Iterable[Verdict], jobs: Sequence[Found], store: Store) -> Iterator[Removed]:
    """Remove what was decided, one unit after the other, each after another look at its run; then old records and uploads.

    Raises:
        StoreError: no permission, or the store failed; what was removed before is whole.
    """
    for verdict in verdicts:
        run = verdict.run
        for unit in verdict.removes:
            if not _is_unchanged(run, store):
                yield Removed(run.uri, problem="was written to meanwhile, and is left as it is")
                break
            _remove_unit(run, unit, store, is_kept=unit.kind in ("table", "checkpoint", "prompts"))
            yield Removed(join(run.uri, unit.name), unit.bytes)
        if verdict.whole:
            yield _whole_run(run, store)
    sweeper = store.sweeper(found.output)
    if jobs:
        sweeper.remove(found.output, [file.name for file in jobs])
        yield Removed(f"{len(jobs)} records of pipeline runs in jobs/", sum(file.size for file in jobs))
    for upload in found.uploads:
        sweeper.abort(found.output, upload)
        yield Removed(f"the parts of an upload of {join(found.output, upload.name)}")


def _is_unchanged(run: Run, store: Store) -> bool:
    """Whether nobody has written to a run since the decision; what this process removes and records does not count."""
    known = set(run.files)
    there = store.sweeper(run.uri).survey(run.uri)
    return all(file in known or is_record_of_removal(file.name) for file in there)


def _remove_unit(run: Run, unit: Unit, store: Store, *, is_kept: bool) -> None:
    """Remove a unit's files, its manifest first; where it ``is_kept`` in mind, with a record of that."""
    uri = join(run.uri, unit.name)
    if is_kept and unit.name in run.manifests:
        store.write(record_uri(uri), store.read(join(uri, MANIFEST)))
    names = [file.name for file in unit.files]
    _remove(run, [f"{unit.name}/{name}" for name in names if name == MANIFEST], store)
    _remove(run, [f"{unit.name}/{name}" for name in names if name != MANIFEST], store)


def _remove(run: Run, names: Sequence[str], store: Store) -> None:
    """Remove files of a run, and its folder with the last of them."""
    if names:
        above = parent(run.uri)
        store.sweeper(above).remove(above, [f"{run.name}/{name}" for name in names])


def _whole_run(run: Run, store: Store) -> Removed:
    """Remove everything of a run, recipe.json last: until then it is a run that is to go."""
    in_units = {f"{unit.name}/{file.name}" for unit in run.units for file in unit.files}
    rest = [file.name for file in run.files if file.name not in in_units and file.name != "recipe.json"]
    steps = [partial(_remove_unit, run, unit, store, is_kept=False) for unit in run.units]
    for step in (*steps, partial(_remove, run, rest, store), partial(_remove, run, ["recipe.json"], store)):
        if not _is_unchanged(run, store):
            return Removed(run.uri, problem="was written to meanwhile; what is left of it is left as it is")
        step()
    return Removed(run.uri, sum(file.size for file in run.files))


def old_jobs(found: Inventory, policy: Policy, now: float) -> list[Found]:
    """Records of pipeline runs that nobody asks for any more: an exit handler reads them at the end of its run."""
    return [file for file in found.jobs if now - file.modified > max(policy.older_than, WINDOW)]
