"""Where an estimate's inputs come from: config.json files, and the manifests of a run that has begun."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from camopd import plan as layout
from camopd.config import Recipe
from camopd.errors import InputError, Problem, StoreError
from camopd.estimate.assumptions import Lengths, typical_lengths
from camopd.estimate.shapes import ModelShape, read_shape
from camopd.past import known
from camopd.plan import Plan
from camopd.recipe.registered import is_registered
from camopd.schedule import Schedule
from camopd.store import Store, is_s3, join

# The numbers of public models, as in the config.json that their makers publish on Hugging Face (Qwen/<name>).
SHIPPED = Path(__file__).with_name("configs")


def model_shapes(recipe: Recipe, given: Mapping[str, str]) -> tuple[dict[str, ModelShape], dict[str, str]]:
    """The shape of the student and of each branch's teacher, and where each comes from.

    In this order: the file given for it; config.json in its folder, where that is on this machine; the shipped one of the
    model's name (the last part of its location); that of ``base``, since adapters have none. A model for which there is none
    counts as the first one that has one: all are of one architecture (method section 1).

    Args:
        recipe: the recipe.
        given: file or folder by ``student`` or branch name.

    Raises:
        InputError: a name that is no model's, a file that cannot be read, or no config.json at all.
    """
    locations = {"student": recipe.student} | {branch.name: recipe.teacher(branch) for branch in recipe.branches}
    unknown = [name for name in given if name not in locations]
    if unknown:
        what = f"{unknown[0]!r} is neither student nor a branch; the names are {', '.join(locations)}"
        raise InputError([Problem("--config", what)])
    by_place = {locations[name]: Path(path).expanduser() for name, path in given.items()}
    base = _known(recipe.base) if recipe.base else None  # of adapters, which have no config.json
    files = {place: by_place.get(place) or _known(place) or base for place in dict.fromkeys(locations.values())}
    shapes = {location: _read(path) for location, path in files.items() if path is not None}
    if not shapes:
        what = f"neither {recipe.student} nor a teacher has a config.json on this machine"
        shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.json")))
        raise InputError([Problem("student", what, f"give --config student=PATH; shipped are those of {shipped}")])
    stand_in = next(iter(shapes))
    found, origins = {}, {}
    for name, location in locations.items():
        path = files[location]
        found[name] = shapes[location if path else stand_in]
        origins[name] = _origin(path) if path else f"{_elsewhere(location)}: taken as {_name(stand_in)}"
    return found, origins


def _name(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]


def _elsewhere(location: str) -> str:
    return "in the registry, which is not asked here" if is_registered(location) else "not on this machine"


def _origin(path: Path) -> str:
    return f"shipped for {path.stem}" if path.parent == SHIPPED else str(path)


def _known(location: str) -> Path | None:
    local = None if is_s3(location) else Path(location) / "config.json"
    shipped = SHIPPED / f"{_name(location)}.json"
    return next((path for path in (local, shipped) if path is not None and path.is_file()), None)


def _read(path: Path) -> ModelShape:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError([Problem(str(file), f"cannot be read as JSON ({error})", "give a model's config.json")]) from None
    if not isinstance(config, dict):
        raise InputError([Problem(str(file), "is not a table of settings", "give a model's config.json")])
    return read_shape(config, str(file))


def lengths_given(options: Sequence[str], option: str, recipe: Recipe, limit: float) -> dict[str, float]:
    """Numbers by branch from ``2048`` (all branches) or ``general=2048``; a later one goes before an earlier one.

    Raises:
        InputError: not a number in (0, limit], or no such branch.
    """
    found: dict[str, float] = {}
    for text in options:
        name, sign, number = text.rpartition("=")
        names = [branch.name for branch in recipe.branches if not sign or branch.name == name]
        if not names:
            known = ", ".join(branch.name for branch in recipe.branches)
            raise InputError([Problem(option, f"there is no branch {name!r}", f"the recipe has {known}")])
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 < value <= limit:
            what = f"{text!r} holds no number above 0 and up to {limit:g}, the recipe's limit"
            raise InputError([Problem(option, what, "write NUMBER or BRANCH=NUMBER")])
        found |= dict.fromkeys(names, value)
    return found


def measured_lengths(run_uri: str, store: Store) -> dict[str, Lengths]:
    """Means over the finished rounds of a run by branch, from its plan and the manifests of its checkpoints.

    Prompt: ``mean_tokens`` of the plan's preflight.json; a branch without a prompt file is left out. Response: ``mean_length``.
    Kept: ``num_selected`` over the samples of a step.

    Raises:
        StoreError: the run was not prepared, or no round is finished.
    """
    plan = Plan.load(store, run_uri)
    preflight = json.loads(store.read(join(layout.plan_uri(run_uri), "preflight.json")))["branches"]
    manifests = [known(layout.checkpoint_uri(uri), store) for uri in plan.rounds]
    rounds = [manifest.metrics for manifest in manifests if manifest is not None]
    if not rounds:
        raise StoreError(f"{run_uri} has no finished round to measure; leave --from out until one is done")
    found = {}
    for name, sampled in samples_a_step(plan.recipe).items():
        own = [metrics for metrics in rounds if f"{name}/mean_length" in metrics]
        if own and name in preflight:
            response, selected = (fmean(m[f"{name}/{key}"] for m in own) for key in ("mean_length", "num_selected"))
            found[name] = Lengths(preflight[name]["mean_tokens"], response, selected / sampled)
    return found


def samples_a_step(recipe: Recipe) -> dict[str, int]:
    """Responses of each branch in a step in which it takes part."""
    per_prompt = recipe.rollout.samples_per_prompt
    return {name: count * per_prompt for active in Schedule.of(recipe).cycle for name, count in active.items()}


@dataclass(frozen=True)
class LengthOptions:
    """What a user says of lengths; each may be left out.

    Attributes:
        run_uri: a run to measure.
        prompt: ``TOKENS`` or ``BRANCH=TOKENS``, any number of them.
        response: the same.
        kept: ``SHARE`` or ``BRANCH=SHARE``.
    """

    run_uri: str = ""
    prompt: Sequence[str] = ()
    response: Sequence[str] = ()
    kept: Sequence[str] = ()


def mean_lengths(recipe: Recipe, options: LengthOptions, store: Store) -> tuple[dict[str, Lengths], dict[str, str]]:
    """By branch, and in words where they are from: what is given goes before what was measured, and this before a guess.

    Raises:
        InputError: an option that makes no sense.
        StoreError: a run that cannot be measured.
    """
    measured = measured_lengths(options.run_uri, store) if options.run_uri else {}
    stated = {
        "prompt": lengths_given(options.prompt, "--prompt-tokens", recipe, recipe.prompts.max_prompt_tokens),
        "response": lengths_given(options.response, "--response-tokens", recipe, recipe.rollout.max_new_tokens),
        "kept": lengths_given(options.kept, "--kept", recipe, 1),
    }
    found, origins = {}, {}
    for name, guess in typical_lengths(recipe).items():
        own = {key: by_branch[name] for key, by_branch in stated.items() if name in by_branch}
        found[name] = replace(measured.get(name, guess), **own)
        rest = (
            f"measured in {options.run_uri}"
            if name in measured
            else "guessed, an eighth of the recipe's limits and the most that selection keeps"
        )
        origins[name] = ", ".join([f"{key} given" for key in own] + [rest] * (len(own) < len(stated)))
    return found, origins
