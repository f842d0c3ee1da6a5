"""Models that are named in a registry: where the files of the version that is meant lie, found out once a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from camopd.config import Recipe
from camopd.errors import Problem, StoreError, TrackingError
from camopd.recipe.registered import Reference, is_registered, reference_of
from camopd.store import Store, is_s3, join
from camopd.tracking import Registry, Tracker, Version

REGISTER = "register the folder that save_pretrained wrote: MlflowClient().create_model_version({name!r}, 's3://bucket/folder')"
FLAVOUR = "MLmodel"  # the file that makes a folder an MLflow model
WHOLE = ("config.json", "tokenizer_config.json")  # of what a flavour saved as it was given


@dataclass(frozen=True)
class Located:
    """Where the model lies, ``models:/NAME/7``: which version that is, and the recovery that made it, if one did."""

    uri: str
    source: str
    recovery: str = ""


@dataclass(frozen=True)
class Resolved:
    """A recipe with places where it named registered models.

    Attributes:
        recipe: in its ``sources`` stands which version each is; a name that could not be found stays.
        located: what each name stands for.
        problems: of the parameters whose names could not be found.
    """

    recipe: Recipe
    located: Mapping[str, Located]
    problems: list[Problem]


def resolve_models(
    recipe: Recipe, tracker: Tracker, store: Store, known: Mapping[str, Mapping[str, str]] | None = None
) -> Resolved:
    """Find out what the registered models of a recipe are and where they lie.

    Args:
        recipe: as asked for.
        tracker: whose registry.
        store: tells what a version's folder holds.
        known: ``uri`` and ``source`` by name, of names that the same pipeline run has looked up already.
    """
    named = {"student": ("student", recipe.student)}
    named |= {"base": ("base", recipe.base)} if recipe.base else {}
    named |= {f"teacher/{b.name}": (f"branches.{b.name}.teacher", b.teacher) for b in recipe.branches if b.teacher}
    found = {name: Located(**record) for name, record in (known or {}).items()}
    problems: dict[str, Problem] = {}
    for where, location in named.values():
        if not is_registered(location) or location in found or location in problems:
            continue
        try:
            found[location] = locate(location, tracker, store)
        except (TrackingError, StoreError) as error:
            problems[location] = Problem(where, str(error))
    sources = {key: found[location].source for key, (_, location) in named.items() if location in found}

    def place(location: str | None) -> str | None:
        return found[location].uri if location in found else location

    branches = tuple(branch.model_copy(update={"teacher": place(branch.teacher)}) for branch in recipe.branches)
    places = {"student": place(recipe.student), "base": place(recipe.base), "branches": branches, "sources": sources}
    return Resolved(recipe.model_copy(update=places), found, list(problems.values()))


def locate(location: str, tracker: Tracker, store: Store) -> Located:
    """Where the files of a registered model lie.

    Args:
        location: ``models:/NAME@alias`` and the other forms.
        tracker: whose registry.
        store: tells what a version's folder holds.

    Raises:
        TrackingError: no registry, no answer, no such version, or one whose files are nowhere that a stage can read.
        StoreError: the version's place cannot be looked at.
    """
    reference = reference_of(location)
    registry = tracker.registry(reference.name)
    if registry is None:
        raise TrackingError(f"{location} names a registered model, and no registry is known; set MLFLOW_TRACKING_URI")
    version = chosen(reference, registry)
    source = f"models:/{reference.name}/{version.number}"
    if not version.ready:
        raise TrackingError(f"{source} is not READY: its registration is under way or has failed; register it again")
    fix = REGISTER.format(name=reference.name)
    place = place_of(version) or _readable(registry.download_uri(version.number))
    if not place:
        raise TrackingError(f"{source} keeps its files behind the tracking server, which no stage reads from; {fix}")
    return Located(_model_folder(place, source, fix, store), source, version.tags.get("camopd.run_id", ""))


def chosen(reference: Reference, registry: Registry) -> Version:
    """The version that is meant. Raises TrackingError that says what there is in its place."""
    versions = registry.versions()
    if not versions:
        raise TrackingError(f"the registry {registry.uri} has no version of a model {reference.name!r}; check its spelling")
    wanted, what = reference.version, f"version {reference.version}"
    if reference.alias:
        wanted, what = registry.aliased(reference.alias), f"alias {reference.alias!r}"
    if reference.tag is not None:
        key, value = reference.tag
        having = [version for version in versions if version.tags.get(key) == value]
        newest = max(having, key=lambda version: (version.ready, version.number), default=None)
        wanted, what = newest.number if newest else None, f"version with the tag {key} = {value!r}"
    found = next((version for version in versions if version.number == wanted), None)
    if found is None:
        numbers = [version.number for version in versions]
        raise TrackingError(f"model {reference.name!r} has no {what} (its versions are {numbers[0]} to {numbers[-1]})")
    return found


def place_of(version: Version) -> str:
    """Where a version says that its files are, by its source or by our own tag; empty where only the server knows."""
    return _readable(version.source) or _readable(version.tags.get("camopd.checkpoint_uri", ""))


def _readable(source: str) -> str:
    """The location as a stage reads it: an ``s3://`` prefix or a folder; empty for anything else."""
    if is_s3(source):
        return source.rstrip("/")
    if source.startswith("file:"):
        return unquote(urlsplit(source).path).rstrip("/")
    return source.rstrip("/") if source.startswith("/") else ""


def _model_folder(place: str, source: str, fix: str, store: Store) -> str:
    """The folder itself, or ``model/`` in an MLflow flavour's folder, where that was saved with all that belongs to it.

    What camopd promotes is both, a model folder with MLflow's file in it. A flavour that was given objects keeps the tokenizer
    apart, in ``components/``: no folder that transformers loads.
    """
    if store.stat(join(place, FLAVOUR)) is None:
        return place
    for folder in (place, join(place, "model")):
        if all(store.stat(join(folder, name)) is not None for name in WHOLE):
            return folder
    raise TrackingError(f"{source} is an MLflow model folder ({place}), which transformers does not load as it is; {fix}")
