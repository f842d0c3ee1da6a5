"""The tables of a recipe: one frozen model a stage, one sentence a setting. Light imports only.

Defaults are the paper's (arXiv:2605.27115) unless a comment says otherwise.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from camopd.recipe.served import is_served
from camopd.recipe.values import TEACHER, Alias, Float, Int, ModelName, Names, PromptSource, Teacher, TrackingUri, Uri


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Branch(Section):
    """One teacher with its prompts and its place in the schedule. The method needs two; more are more entries."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,30}$", description="Name in paths, metrics and reports.")
    role: Literal["recover", "retain"] = Field(description="Whether the gate asks for a gain or for no loss.")
    teacher: Teacher | None = Field(
        None, description="Model that teaches the branch, or http://host/v1 that serves it; none means the frozen student."
    )
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

    @model_validator(mode="after")
    def _asked_what_it_can_answer(self) -> Branch:
        if self.is_served and self.teacher_prompts:
            raise ValueError(
                f"the teacher {self.teacher} is served, and prompts of its own need its chat template: give a prompt file, or "
                "the teacher's folder"
            )
        return self

    @property
    def is_served(self) -> bool:
        """Whether the teacher is somebody's server."""
        return self.teacher is not None and is_served(self.teacher)

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

    HOW: ClassVar[frozenset[str]] = frozenset({"replicas"})  # leaves the samples as they are

    engine: Literal["transformers", "vllm"] = Field("transformers", description="What samples and scores.")
    sampler: Literal["student", "teacher"] = Field("student", description="Who answers; the teacher does in off-policy KD.")
    prompts_per_step: Int = Field(512, ge=1, description="Prompts of one optimiser step.")
    samples_per_prompt: Int = Field(1, ge=1, description="Responses for each prompt.")
    max_new_tokens: Int = Field(32768, ge=1, description="Longest response, in tokens.")
    batch_size: Int = Field(64, ge=1, description="Sequences decoded together.")
    replicas: Int = Field(1, ge=1, description="Copies of a model in a pod that share sampling and scoring, each on its GPUs.")
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


class Lora(Section):
    """An adapter that learns in place of the weights. An adapter that is the domain model goes on learning; over a whole domain
    model a new one begins, as nothing. The defaults are ours: the paper trains all weights."""

    rank: Int | None = Field(None, ge=1, description="Of the two matrices; none: the given adapter's, or 16.")
    alpha: Float | None = Field(None, gt=0, description="The product counts alpha / rank; none: the given one's, or 2 rank.")
    targets: Names | None = Field(
        None, min_length=1, description="Ends of the names of layers that get one; none: the given one's, or all linear layers."
    )
    output: Literal["adapter", "merged"] = Field(
        "adapter", description="A checkpoint is the adapter alone, or a whole model with it merged in."
    )


class Train(Section):
    """The updates. eps_lo, eps_hi and the optimiser's details are unpublished: the defaults are ours (method section 2)."""

    HOW: ClassVar[frozenset[str]] = frozenset(  # leave the weights as they are
        {"num_processes", "activation_checkpointing", "checkpoint_every"}
    )

    lora: Lora | None = Field(None, description="Train an adapter, all weights frozen; none trains all weights.")

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
    checkpoint_every: Int = Field(0, ge=0, description="Updates between saves inside a round, beside the next ones; 0: none.")
    diagnose_every: Int = Field(8, ge=0, description="Updates between looks at the branches' gradients; 0 looks never.")
    max_engine_gap: Float = Field(0.1, gt=0, description="Mean |log p_engine - log p_trainer| that means stale weights.")

    @field_validator("ratio_high")
    @classmethod
    def _above_low(cls, high: float, info: ValidationInfo) -> float:
        low = info.data.get("ratio_low")
        if low is not None and low >= high:
            raise ValueError(f"ratio_high {high} must be above ratio_low {low}")
        return high

    def shaping(self) -> dict[str, Any]:
        """What shapes the weights. A run without an adapter has the id it had before there were any."""
        return self.model_dump(mode="json", exclude={*self.HOW, *({"lora"} if self.lora is None else ())})


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

    policy: Literal["auto", "manual", "never"] = Field(
        "auto", description="The gate moves the alias; or a passed model waits for `camopd approve`; or nothing is registered."
    )
    model_name: ModelName = Field("camopd-recovered", description="Registered model in MLflow.")
    alias: Alias = Field("champion", description="Alias that moves to the new version.")
    candidate_alias: Alias = Field(
        "candidate", validate_default=True, description="Alias of the version that waits, with policy manual."
    )

    @field_validator("candidate_alias")
    @classmethod
    def _apart(cls, candidate: str, info: ValidationInfo) -> str:
        if info.data.get("policy") == "manual" and candidate == info.data.get("alias"):
            raise ValueError(f"candidate_alias and alias are both {candidate!r}: a version that waits would be in use already")
        return candidate


class Tracking(Section):
    """Where runs are logged."""

    uri: TrackingUri | None = Field(None, description="MLflow tracking URI; none means MLFLOW_TRACKING_URI, or no tracking.")
    experiment: str = Field("camopd", pattern=r"\S", description="MLflow experiment.")
