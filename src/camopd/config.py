"""The recipe: every setting of a recovery, checked before anything is started.

Light imports only (no torch, no kfp): a recipe is read by the command line, by the pipeline's first CPU step and by people's
own scripts. One frozen model a stage; defaults are the paper's (arXiv:2605.27115) unless a comment says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from camopd.errors import InputError, Problem
from camopd.presets import Preset, presets
from camopd.recipe.document import KeyPath, absolute, read_document
from camopd.recipe.explain import did_you_mean, explained
from camopd.recipe.parameters import AS_IN_RECIPE, apply_parameters
from camopd.recipe.values import TEACHER, Alias, Float, Int, ModelName, Names, PromptSource, TrackingUri, Uri
from camopd.store import Store

__all__ = ["AS_IN_RECIPE", "TEACHER", "Branch", "Recipe", "cautions", "load_recipe"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Branch(Section):
    """One teacher with its prompts and its place in the schedule. The method needs two; more are more entries."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,30}$", description="Name in paths, metrics and reports.")
    role: Literal["recover", "retain"] = Field(description="Whether the gate asks for a gain or for no loss.")
    teacher: Uri | None = Field(None, description="Model that teaches the branch; none means the frozen student.")
    prompts: PromptSource = Field(
        description="JSONL with `prompt` or `messages` rows, may be gzipped; `teacher`: it makes up its own."
    )
    teacher_prompts: Float = Field(0.0, ge=0, le=1, description="Share of the prompts that the teacher makes up (Magpie).")
    num_teacher_prompts: Int = Field(10_000, ge=1, description="How many prompts it makes up, before they come round again.")
    tasks: Names = Field((), description="lm-eval tasks whose mean is this branch's score.")
    steps: Int = Field(1, ge=0, description="Optimiser steps in one cycle, or part of a mixed batch; 0 takes no part.")
    scale: Float = Field(1.0, gt=0, description="Factor r_b on the advantage.")
    mass: Float = Field(1.0, gt=0, le=1, description="Share rho of the gap mass that selection keeps; 1 is no selection.")
    score: Literal["absolute", "positive", "kl"] = Field("absolute", description="Gap of a token: |A|, max(A, 0), or exact KL.")

    @model_validator(mode="before")
    @classmethod
    def _score_by_role(cls, values: Any) -> Any:
        """A branch to retain looks only at what the student has lost against its teacher (method section 4)."""
        if isinstance(values, dict) and "score" not in values and values.get("role") == "retain":
            values = {**values, "score": "positive"}
        if isinstance(values, dict) and values.get("prompts") == TEACHER:
            values = {"teacher_prompts": 1.0, **values}
        return values

    @field_validator("teacher_prompts")
    @classmethod
    def _all_without_a_file(cls, share: float, info: ValidationInfo) -> float:
        if info.data.get("prompts") == TEACHER and share != 1:
            raise ValueError(f'teacher_prompts {share:g} needs a prompt file beside it; with prompts = "teacher" leave it out')
        return share

    @property
    def has_prompt_file(self) -> bool:
        return self.prompts != TEACHER


class Prompts(Section):
    """How prompt files become token ids, once, in `prepare`."""

    max_prompt_tokens: Int = Field(4096, ge=1, description="Longest prompt that is kept, in tokens.")
    overlong: Literal["skip", "truncate_left", "fail"] = Field("skip", description="What happens to a longer one.")
    max_bad_row_fraction: Float = Field(0.0, ge=0, lt=1, description="Share of unusable rows that is tolerated.")
    chat_template: Uri | None = Field(None, description="Jinja file used in place of the student's own template.")
    enable_thinking: bool | None = Field(None, description="Passed to the chat template; none leaves it out.")


class Rollout(Section):
    """Sampling, always at temperature 1 and top-p 1: on-policy."""

    engine: Literal["transformers", "vllm"] = Field("transformers", description="What samples and scores.")
    sampler: Literal["student", "teacher"] = Field("student", description="Who answers; the teacher does in off-policy KD.")
    prompts_per_step: Int = Field(512, ge=1, description="Prompts of one optimiser step.")
    samples_per_prompt: Int = Field(1, ge=1, description="Responses for each prompt.")
    max_new_tokens: Int = Field(32768, ge=1, description="Longest response, in tokens.")
    batch_size: Int = Field(64, ge=1, description="Sequences decoded together.")
    max_length_growth: Float = Field(8.0, gt=1, description="Mean response length against round 1 that stops the run.")
    max_empty_fraction: Float = Field(0.05, ge=0, le=1, description="Share of empty responses that stops the run.")


class VLLM(Section):
    """The vLLM engine. Field names are vLLM's own arguments."""

    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Numbers that it computes in.")
    tensor_parallel_size: Int = Field(1, ge=1, description="GPUs that share one model.")
    gpu_memory_utilization: Float = Field(0.85, gt=0, le=1, description="Share of a GPU that it takes; scoring needs more.")
    enforce_eager: bool = Field(False, description="No compilation, no CUDA graphs: starts sooner, decodes slower.")


class Score(Section):
    """What the teachers say about the student's tokens."""

    signal: Literal["sampled", "topk", "full"] = Field(
        "sampled", description="Log-probability of the sampled token, top-k, or the whole vocabulary (colocated alone)."
    )
    top_k: Int = Field(8, ge=1, description="Tokens a position of the top-k signal; the rest is one more.")
    top_k_of: Literal["teacher", "student"] = Field("teacher", description="Whose most likely tokens these are.")
    empty_answers: Literal["skip", "score"] = Field("skip", description="Answers of an end token alone: left out, or scored.")
    floor: Float = Field(1e-3, ge=0, description="Mean gap, nats a token, up to which a batch is rounding: all is kept.")
    batch_tokens: Int = Field(16384, ge=1, description="Padded tokens in one forward pass.")


class Train(Section):
    """The updates. eps_lo, eps_hi and the optimiser's details are unpublished: the defaults are ours (method section 2)."""

    HOW: ClassVar[frozenset[str]] = frozenset({"num_processes", "activation_checkpointing"})  # leave the weights as they are

    learning_rate: Float = Field(2e-6, gt=0, description="AdamW step size, constant.")
    weight_decay: Float = Field(0.0, ge=0, description="AdamW decoupled weight decay.")
    beta1: Float = Field(0.9, ge=0, lt=1, description="AdamW first-moment decay.")
    beta2: Float = Field(0.95, ge=0, lt=1, description="AdamW second-moment decay.")
    max_grad_norm: Float = Field(1.0, gt=0, description="Gradient clip, L2 norm over all parameters.")
    ratio_low: Float = Field(0.5, ge=0, description="eps_lo: a smaller trainer/engine ratio masks the token.")
    ratio_high: Float = Field(
        2.0, gt=0, validate_default=True, description="eps_hi: a larger trainer/engine ratio masks the token."
    )
    advantage_clip: Float | None = Field(None, gt=0, description="Clip on |A| in nats (MOPD clips at 5); none is CaMOPD.")
    batch_tokens: Int = Field(16384, ge=1, description="Padded tokens in one forward and backward pass.")
    logits_mib: Int = Field(64, ge=1, description="Size of the float32 logits that are alive at once, MiB.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of forward and backward passes; weights, sums of gradients and moments are float32."
    )
    activation_checkpointing: bool = Field(False, description="Compute layers again in the backward pass: less memory.")
    num_processes: Int = Field(1, ge=1, description="Processes of one machine that share the updates (FSDP), a GPU each.")
    diagnose_every: Int = Field(8, ge=0, description="Updates between looks at the branches' gradients; 0 looks never.")
    max_engine_gap: Float = Field(0.1, gt=0, description="Mean |log p_engine - log p_trainer| that means stale weights.")

    @field_validator("ratio_high")
    @classmethod
    def _above_low(cls, high: float, info: ValidationInfo) -> float:
        low = info.data.get("ratio_low")
        if low is not None and low >= high:
            raise ValueError(f"ratio_high {high} must be above ratio_low {low}")
        return high


class Evaluate(Section):
    """The same harness settings for teacher, before and after."""

    task_dir: Uri | None = Field(None, description="Folder of lm-eval YAML tasks; none means lm-eval's own.")
    limit: Int | None = Field(None, ge=1, description="Samples a task; none means all.")
    batch_size: Int = Field(64, ge=1, description="Sequences evaluated together.")
    curve_points: Int = Field(4, ge=0, description="Rounds between the first and the last that are evaluated, too.")
    bootstrap: Int = Field(2000, ge=100, description="Resamples behind each interval.")
    answers: Int = Field(10, ge=0, description="Sample answers before and after shown in the report.")


class Gate(Section):
    """When a recovered model is good enough: both by the lower end of the 95 % interval."""

    min_recovered: Float = Field(0.3, description="Share of the general loss that must be recovered.")
    min_retained: Float = Field(0.95, ge=0, description="Share of the domain score that must be retained.")


class Promote(Section):
    """Where a passed model goes."""

    enabled: bool = Field(True, description="False: evaluate and decide, register nothing.")
    model_name: ModelName = Field("camopd-recovered", description="Registered model in MLflow.")
    alias: Alias = Field("champion", description="Alias that moves to the new version.")


class Tracking(Section):
    """Where runs are logged."""

    uri: TrackingUri | None = Field(None, description="MLflow tracking URI; none means MLFLOW_TRACKING_URI, or no tracking.")
    experiment: str = Field("camopd", pattern=r"\S", description="MLflow experiment.")


class Recipe(Section):
    """A whole recovery."""

    name: str = Field("recovery", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$", description="First part of the run's folder.")
    notes: str = Field("", description="Free text kept with the run.")
    method: str = Field("camopd", description="Preset that fills in what the recipe leaves out; see camopd.presets.")
    mixing: Literal["alternating", "mixed"] = Field("alternating", description="One branch a step, or all in every step.")
    student: Uri = Field(description="The domain model to recover; a frozen copy teaches where a branch names no teacher.")
    output: Uri = Field("./runs", description="Folder or s3:// prefix under which the run's own folder is made.")
    seed: Int = Field(0, ge=0, description="Seed of sampling and of prompt order.")
    num_rounds: Int = Field(30, description="Times rollout, score, select and train are repeated.")
    steps_per_round: Int = Field(4, ge=1, description="Optimiser steps on the rollouts of one round.")
    execution: Literal["staged", "colocated"] = Field(
        "staged", description="Rounds of stages, or one process with a fresh batch a step and a checkpoint a round."
    )
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

    @field_validator("branches")
    @classmethod
    def _consistent(cls, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        names = [branch.name for branch in branches]
        if len(set(names)) != len(names):
            raise ValueError(f"branch names must differ, got {', '.join(names)}")
        if not any(branch.role == "recover" for branch in branches):
            raise ValueError('no branch has role = "recover": there is nothing to recover')
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
        if rollout.engine == "vllm" and info.data.get("execution") == "colocated":
            raise ValueError(
                "engine vllm keeps a model of its own, and execution colocated samples from the one in training: use engine "
                "transformers, or execution staged"
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
            problems.append("signal full needs student and teacher in one process: use `camopd recover`, or topk")
        rollout = info.data.get("rollout", Rollout())
        if score.signal == "topk" and score.top_k_of == "student" and rollout.engine == "vllm":
            problems.append("top_k_of student needs log-probabilities of given tokens, which engine vllm has not; use teacher")
        if score.top_k_of == "student" and rollout.sampler == "teacher":
            problems.append("top_k_of student needs answers that the student sampled; use teacher")
        if exact and not (score.signal == "topk" and score.top_k_of == "student"):
            problems.append(f"score kl of branch {exact[0]} needs signal topk with top_k_of student: both models' values")
        if problems:
            raise ValueError("; ".join(problems))
        return score

    @field_validator("train")
    @classmethod
    def _one_process_where_models_stay(cls, train: Train, info: ValidationInfo) -> Train:
        if train.num_processes > 1 and info.data.get("execution") == "colocated":
            raise ValueError(
                f"num_processes {train.num_processes} needs the stages: `camopd recover` keeps all models in one process; "
                "use `camopd run`, or set it to 1"
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
            ``recipe`` leaves the recipe's value alone; every other value is meant, '' and 0 and False included.
        store: reads an s3:// source.

    Raises:
        InputError: every problem of the recipe and of the parameters, each with its parameter or its file and line.
    """
    document = read_document(source, store or Store())
    values = _with_absolute_locations(document.values, document.base)
    values, origins, problems = apply_parameters(values, parameters or {}, Recipe, Branch)
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


def cautions(recipe: Recipe) -> tuple[str, ...]:
    """What is allowed in a recipe but seldom meant, as sentences."""
    same = [
        f"branches.{branch.name}.teacher: the teacher is the student itself, so there is no gap to close; name another"
        for branch in recipe.branches
        if branch.role == "recover" and recipe.teacher(branch) == recipe.student
    ]
    unseen = "train.diagnose_every: gradients are not compared where train.num_processes is above 1; 0 says so"
    return (*same, *[unseen] * (recipe.train.num_processes > 1 and recipe.train.diagnose_every > 0))


_LOCATIONS = (("student",), ("output",), ("prompts", "chat_template"), ("evaluate", "task_dir"))
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
    section = Recipe.model_fields[str(path[0])].annotation if len(path) > 1 else Recipe
    return section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
