"""The recipe: every setting of a recovery, checked before anything is started.

Light imports only (no torch, no kfp): a recipe is read by the command line, by the pipeline's first CPU step and by people's
own scripts. One frozen model a stage; defaults are the paper's (arXiv:2605.27115) unless a comment says otherwise.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from camopd.errors import InputError, Problem
from camopd.presets import Preset, presets
from camopd.recipe.document import KeyPath, absolute, read_document, to_toml
from camopd.recipe.explain import did_you_mean, explained
from camopd.recipe.parameters import AS_IN_RECIPE, apply_parameters, section_of
from camopd.recipe.sections import (
    VLLM,
    Branch,
    Evaluate,
    Gate,
    Promote,
    Prompts,
    Rollout,
    Score,
    Section,
    Tracking,
    Train,
)
from camopd.recipe.values import TEACHER, Int, Model, Uri
from camopd.store import Store

__all__ = [
    "AS_IN_RECIPE",
    "TEACHER",
    "VLLM",
    "Branch",
    "Evaluate",
    "Gate",
    "Promote",
    "Prompts",
    "Recipe",
    "Rollout",
    "Score",
    "Tracking",
    "Train",
    "cautions",
    "load_recipe",
    "recipe_text",
]


OUTPUT = "CAMOPD_OUTPUT"  # where a cluster's runs go, said once for all recipes


class Recipe(Section):
    """A whole recovery."""

    name: str = Field("recovery", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$", description="First part of the run's folder.")
    notes: str = Field("", description="Free text kept with the run.")
    method: str = Field("camopd", description="Preset that fills in what the recipe leaves out; see camopd.presets.")
    mixing: Literal["alternating", "mixed"] = Field("alternating", description="One branch a step, or all in every step.")
    student: Model = Field(description="The domain model to recover; a frozen copy teaches where a branch names no teacher.")
    base: Model | None = Field(None, description="Model under every LoRA adapter; none: where adapter_config.json says.")
    output: Uri = Field("./runs", description="Folder or s3:// prefix under which the run's own folder is made.")
    seed: Int = Field(0, ge=0, description="Seed of sampling and of prompt order.")
    num_rounds: Int = Field(30, description="Times rollout, score, select and train are repeated.")
    steps_per_round: Int = Field(4, ge=1, description="Optimiser steps on the rollouts of one round.")
    execution: Literal["staged", "colocated"] = Field(
        "staged", description="Rounds of stages, or one process with a fresh batch a step and a checkpoint a round."
    )
    shards: Int = Field(1, ge=1, description="Pods that share a round's sampling, and as many for each branch's scoring.")
    num_threads: Int | None = Field(None, ge=1, description="CPU threads; 1 makes runs bit-identical.")
    branches: tuple[Branch, ...] = Field(description="At least one to recover; see Branch.")
    prompts: Prompts = Prompts()
    rollout: Rollout = Rollout()
    vllm: VLLM = VLLM()
    score: Score = Field(Score(), validate_default=True)
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    promote: Promote = Promote()
    tracking: Tracking = Tracking()
    sources: dict[str, str] = Field({}, description="Written by prepare: registry version behind a model's location.")

    @model_validator(mode="before")
    @classmethod
    def _filled_from_preset(cls, values: Any) -> Any:
        """Put the preset's values where the recipe has none. An unknown name is left for its own validator."""
        method = values.get("method", "camopd") if isinstance(values, dict) else None
        preset = presets().get(method) if isinstance(method, str) else None
        return values if preset is None else _filled(values, preset)

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in presets():
            raise ValueError(f"there is no method {name!r}; {did_you_mean(name, list(presets()))}")
        return name

    @field_validator("num_rounds")
    @classmethod
    def _at_least_one(cls, number: int) -> int:
        if number < 1:
            raise ValueError(f"{number} rounds would train nothing and leave nothing to evaluate; ask for 1 or more")
        return number

    @field_validator("shards")
    @classmethod
    def _one_shard_where_models_stay(cls, shards: int, info: ValidationInfo) -> int:
        if shards > 1 and info.data.get("execution") == "colocated":
            raise ValueError(
                f"{shards} pods need the stages: `camopd recover` is one process; use `camopd run`, or set it to 1"
            )
        return shards

    @field_validator("branches")
    @classmethod
    def _consistent(cls, branches: tuple[Branch, ...], info: ValidationInfo) -> tuple[Branch, ...]:
        names = [branch.name for branch in branches]
        if len(set(names)) != len(names):
            raise ValueError(f"branch names must differ, got {', '.join(names)}")
        if not any(branch.role == "recover" for branch in branches):
            raise ValueError('no branch has role = "recover": there is nothing to recover')
        served = [branch.name for branch in branches if branch.is_served]
        if served and info.data.get("execution") == "colocated":
            raise ValueError(
                f"the teacher of branch {served[0]} is served, and execution colocated keeps teachers in its own process: use "
                "`camopd run`, or give the teacher's folder"
            )
        if not any(branch.steps for branch in branches if branch.role == "recover"):
            raise ValueError('every branch with role = "recover" has steps = 0: nothing would be recovered')
        return branches

    @field_validator("rollout")
    @classmethod
    def _prompts_for_all(cls, rollout: Rollout, info: ValidationInfo) -> Rollout:
        """A branch whose part of a mixed batch is below one prompt would never be trained."""
        parts = [branch.steps for branch in info.data.get("branches", ()) if branch.steps]
        if info.data.get("mixing") == "mixed" and parts and rollout.prompts_per_step * min(parts) < sum(parts):
            least = -(-sum(parts) // min(parts))
            raise ValueError(
                f"prompts_per_step {rollout.prompts_per_step} cannot be mixed {':'.join(map(str, parts))}; set at least {least}"
            )
        return rollout

    @field_validator("rollout")
    @classmethod
    def _engine_fits(cls, rollout: Rollout, info: ValidationInfo) -> Rollout:
        if rollout.engine == "vllm" and rollout.sampler == "teacher" and info.data.get("execution") == "colocated":
            raise ValueError(
                "engine vllm with execution colocated samples from the student alone, and here the teachers answer: use engine "
                "transformers, or execution staged"
            )
        if rollout.replicas > 1 and info.data.get("execution") == "colocated":
            raise ValueError(
                f"replicas {rollout.replicas} need the stages: `camopd recover` samples from the one model in training; use "
                "`camopd run`, or set it to 1"
            )
        return rollout

    @field_validator("score")
    @classmethod
    def _signal_fits(cls, score: Score, info: ValidationInfo) -> Score:
        """The rule of some methods is defined for some signals only, and the whole vocabulary does not travel."""
        method, branches = info.data.get("method"), info.data.get("branches", ())
        allowed = presets()[method].signals if method else (score.signal,)
        exact = [branch.name for branch in branches if branch.score == "kl" and branch.mass < 1]
        problems = []
        if score.signal not in allowed:
            problems.append(f"method {method} is defined for signal {' or '.join(allowed)}, not {score.signal}")
        if score.signal == "full" and info.data.get("execution") == "staged":
            problems.append(
                "signal full needs student and teacher in one process: set execution to colocated, as `camopd recover` "
                "does, or use topk"
            )
        rollout = info.data.get("rollout", Rollout())
        staged = info.data.get("execution") != "colocated"
        if score.signal == "topk" and score.top_k_of == "student" and rollout.engine == "vllm" and staged:
            problems.append("top_k_of student needs log-probabilities of given tokens, which engine vllm has not; use teacher")
        served = [branch.name for branch in branches if branch.is_served]
        if served and score.signal == "topk" and score.top_k_of == "student":
            problems.append(f"top_k_of student needs log-probabilities of given tokens, which {served[0]}'s server has not")
        if score.top_k_of == "student" and rollout.sampler == "teacher":
            problems.append("top_k_of student needs answers that the student sampled; use teacher")
        if exact and not (score.signal == "topk" and score.top_k_of == "student"):
            problems.append(f"score kl of branch {exact[0]} needs signal topk with top_k_of student: both models' values")
        if problems:
            raise ValueError("; ".join(problems))
        return score

    @field_validator("train")
    @classmethod
    def _trains_where_models_stay(cls, train: Train, info: ValidationInfo) -> Train:
        if train.num_processes > 1 and info.data.get("execution") == "colocated":
            raise ValueError(
                f"num_processes {train.num_processes} needs the stages: `camopd recover` keeps all models in one process; "
                "use `camopd run`, or set it to 1"
            )
        if train.lora and info.data.get("execution") == "colocated" and info.data.get("rollout", Rollout()).engine == "vllm":
            raise ValueError(
                "lora with execution colocated samples from the adapter in training, which engine vllm does not have: use "
                "engine transformers, or execution staged"
            )
        return train

    def branch(self, name: str) -> Branch:
        """The branch of that name. Raises KeyError with the names that exist."""
        for branch in self.branches:
            if branch.name == name:
                return branch
        raise KeyError(f"no branch {name!r}; the recipe has {', '.join(b.name for b in self.branches)}")

    def teacher(self, branch: Branch) -> str:
        """URI of the branch's teacher: its own, or the frozen student."""
        return branch.teacher or self.student


def _filled(values: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    """The recipe's values on top of the preset's."""
    filled = {"mixing": preset.mixing, **values}
    if isinstance(values.get("rollout", {}), dict):
        filled["rollout"] = {"sampler": preset.sampler, **values.get("rollout", {})}
    branches = values.get("branches")
    if isinstance(branches, list | tuple):
        filled["branches"] = [_branch_filled(branch, preset) for branch in branches]
    return filled


def _branch_filled(branch: Any, preset: Preset) -> Any:
    if not isinstance(branch, dict) or branch.get("role") not in ("recover", "retain"):
        return branch  # a Branch that has its values, or a mistake that its validation names
    role = branch["role"]
    return {"steps": preset.steps[role], "scale": preset.scale[role], "mass": preset.mass[role], **branch}


# --- Loading --------------------------------------------------------------------------------------------------------------


def load_recipe(source: str | Path, parameters: Mapping[str, Any] | None = None, *, store: Store | None = None) -> Recipe:
    """Read a recipe, put parameters in place of its values, and check all of it.

    Args:
        source: TOML text, a TOML file, its s3:// URI, or the name of a recipe in ./recipes. Relative locations (``./x``) in a
            file are relative to that file, in text and in parameters to the current folder.
        parameters: values by run-form field (``method_learning_rate``) or dotted key (``branches.general.mass``). The text
            ``recipe`` leaves the recipe's value alone; every other value is meant, '' and 0 and False included. Where they do
            not say the output, the environment's CAMOPD_OUTPUT goes before the recipe's.
        store: reads an s3:// source.

    Raises:
        InputError: every problem of the recipe and of the parameters, each with its parameter or its file and line.
    """
    document = read_document(source, store or Store())
    values = _with_absolute_locations(document.values, document.base)
    values, origins, problems = apply_parameters(values, parameters or {}, Recipe, Branch)
    if (shared := os.environ.get(OUTPUT)) and ("output",) not in origins:
        values["output"], origins[("output",)] = shared, OUTPUT
    if "sources" in values:
        place = origins.get(("sources",)) or document.where(("sources",), "sources")
        problems.append(Problem(place, "tells where models came from, and is written by prepare", "leave it out"))
    values.setdefault("output", Recipe.model_fields["output"].default)
    values = _with_absolute_locations(values, str(Path.cwd()))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path = detail["loc"]
            where = next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None)
            what, fix = explained(detail, _fields_at(path))
            problems.append(Problem(where or document.where(path, _dotted(path, values)), what, fix))
        raise InputError(problems) from None
    if problems:
        raise InputError(problems)
    return recipe


def recipe_text(
    source: str | Path, parameters: Mapping[str, Any] | None = None, *, home: str | None = None, store: Store | None = None
) -> str:
    """A recipe as TOML text that means the same anywhere: parameters in place, relative locations resolved.

    Where nothing has to change it is the recipe's own text, comments and all.

    Args:
        source: as in ``load_recipe``, which is to have accepted it with these parameters.
        parameters: as there.
        home: what the recipe's relative locations are relative to, where it is another place than its own.
        store: reads an s3:// source.

    Raises:
        InputError: the recipe cannot be read.
    """
    document = read_document(source, store or Store())
    values = _with_absolute_locations(document.values, home or document.base)
    values, _, _ = apply_parameters(values, parameters or {}, Recipe, Branch)
    values = _with_absolute_locations(values, str(Path.cwd()))
    return document.text if values == document.values else to_toml(values)


def cautions(recipe: Recipe) -> tuple[str, ...]:
    """What is allowed in a recipe but seldom meant, as sentences."""
    same = [
        f"branches.{branch.name}.teacher: the teacher is the student itself, so there is no gap to close; name another"
        for branch in recipe.branches
        if branch.role == "recover" and recipe.teacher(branch) == recipe.student
    ]
    unseen = "train.diagnose_every: gradients are not compared where train.num_processes is above 1; 0 says so"
    unused = "train.checkpoint_every: execution colocated saves where a round ends; set steps_per_round, or this to 0"
    idle = "shards: a round has fewer batches of rollout.batch_size than shards, which work on whole ones: some are idle"
    small = "train.learning_rate: an adapter usually wants 10 to 100 times the rate for all weights, which the default is"
    spread, colocated = recipe.train.num_processes > 1, recipe.execution == "colocated"
    default_rate = "learning_rate" not in recipe.train.model_fields_set
    rollout = recipe.rollout
    samples = recipe.steps_per_round * rollout.prompts_per_step * rollout.samples_per_prompt
    batch = rollout.batch_size if rollout.engine == "transformers" else 1
    return (
        *same,
        *[unseen] * (spread and recipe.train.diagnose_every > 0),
        *[unused] * (colocated and recipe.train.checkpoint_every > 0),
        *[small] * (recipe.train.lora is not None and default_rate),
        *[idle] * (recipe.shards > 1 and samples <= (recipe.shards - 1) * batch),
    )


_LOCATIONS = (("student",), ("base",), ("output",), ("prompts", "chat_template"), ("evaluate", "task_dir"))
_BRANCH_LOCATIONS = ("teacher", "prompts")


def _with_absolute_locations(values: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Resolve the relative locations that are there; what is malformed is left for validation to name."""
    resolved: dict[str, Any] = copy.deepcopy(dict(values))
    branches = resolved.get("branches")
    places = [(resolved if len(path) == 1 else resolved.get(path[0]), path[-1]) for path in _LOCATIONS]
    places += [(entry, key) for entry in (branches if isinstance(branches, list) else []) for key in _BRANCH_LOCATIONS]
    for table, key in places:
        if isinstance(table, dict) and isinstance(table.get(key), str) and (key, table[key]) != ("prompts", TEACHER):
            table[key] = absolute(table[key], base)
    return resolved


def _dotted(path: KeyPath, values: Mapping[str, Any]) -> str:
    """``("branches", 0, "mass") -> branches.general.mass``, by number where the branch has no name."""
    if len(path) < 2 or path[0] != "branches" or not isinstance(path[1], int):
        return ".".join(map(str, path))
    entry = values["branches"][path[1]]
    name = entry.get("name") if isinstance(entry, dict) else None
    return ".".join(map(str, ("branches", name or path[1], *path[2:])))


def _fields_at(path: KeyPath) -> Mapping[str, FieldInfo]:
    """The settings of the table that holds the key."""
    if path[0] == "branches" and len(path) > 1:
        return Branch.model_fields
    section: type[BaseModel] | None = Recipe
    for part in path[:-1]:
        section = section_of(section.model_fields[str(part)]) if section and part in section.model_fields else None
    return section.model_fields if section else {}
