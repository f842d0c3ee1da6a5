"""All of an estimate: GPU memory and number, tokens, operations, hours, bytes, pods, money.

Pure arithmetic over a recipe, the models' shapes and named assumptions; nothing here loads a weight or asks a GPU. What is not
counted: evaluation, diagnostics, prompts that teachers make up, and the time that transfers to and from the store take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from camopd.config import Recipe
from camopd.estimate import storage
from camopd.estimate.assumptions import Assumptions, Lengths
from camopd.estimate.colocated import colocated_advice, colocated_memory, sampling_memory
from camopd.estimate.memory import Memory, largest_batch, rollout_memory, score_memory, train_memory
from camopd.estimate.pods import check_pods, pods
from camopd.estimate.shapes import ModelShape
from camopd.estimate.work import (
    BranchTokens,
    Stage,
    branch_tokens,
    num_steps,
    rollout_work,
    samples_of,
    score_work,
    scored_branches,
    sequences_together,
    start_work,
    train_work,
)

STUDENT = "student"


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        lengths: mean lengths by branch that all of it rests on.
        memory: by stage; one stage ``recover`` where everything is one process.
        tokens: by branch.
        work: by stage and branch.
        tables: bytes by stage, upper bounds.
        checkpoints: bytes of all checkpoints, one a round.
        pods: of the whole run.
        object_bytes: of the Workflow object.
        price: of a GPU-hour, if one was given.
    """

    lengths: Mapping[str, Lengths]
    memory: Mapping[str, Memory]
    tokens: Mapping[str, BranchTokens]
    work: tuple[Stage, ...]
    tables: Mapping[str, float]
    checkpoints: int
    pods: int
    object_bytes: float
    price: float | None

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_seconds for stage in self.work) / 3600

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.work)

    @property
    def stored_bytes(self) -> float:
        return sum(self.tables.values()) + self.checkpoints

    @property
    def hours(self) -> float | None:
        """From start to end with the least GPUs of each stage, one stage after another; None where a stage fits nowhere."""
        seconds = [stage.gpu_seconds / stage.gpus for stage in self.work if stage.gpus is not None]
        return sum(seconds) / 3600 if len(seconds) == len(self.work) else None

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.gpu_hours * self.price

    def peak_share_for(self, hours: float, given: Assumptions) -> float | None:
        """The share of peak at which the run would take so many GPU-hours, everything else as assumed.

        Time at peak scales with its inverse, decoding that waits for memory and pod starts do not. None where these alone take
        longer.
        """
        arithmetic = sum(stage.flops for stage in self.work if stage.name != "rollout") / given.flops
        left = hours * 3600 - (self.gpu_hours * 3600 - arithmetic)
        return given.peak_share * arithmetic / left if left > 0 else None

    def to_record(self) -> dict[str, Any]:
        """For JSON: bytes, seconds, tokens and FLOPs as plain numbers, with the totals."""
        totals = ("gpu_hours", "hours", "flops", "stored_bytes", "cost")
        record = asdict(self) | {name: getattr(self, name) for name in totals}
        for stage, memory in self.memory.items():
            record["memory"][stage]["bytes_on_each"] = memory.on_each(memory.gpus) if memory.gpus else None
        return record


def estimate(recipe: Recipe, shapes: Mapping[str, ModelShape], lengths: Mapping[str, Lengths], given: Assumptions) -> Estimate:
    """What the recipe's run takes.

    Args:
        recipe: the recipe.
        shapes: of ``student`` and of each branch's teacher, by the branch's name.
        lengths: mean lengths by branch.
        given: assumptions.

    Raises:
        InputError: more rounds than the cluster's control plane holds.
    """
    samples = samples_of(recipe, num_steps(recipe))
    active = scored_branches(recipe)
    memory = stage_memory(recipe, shapes, samples, given)
    student = shapes[STUDENT]
    return Estimate(
        lengths={name: lengths[name] for name in samples},
        memory=memory,
        tokens={name: branch_tokens(count, lengths[name]) for name, count in samples.items()},
        work=tuple(stage_work(recipe, shapes, samples, lengths, memory, active, given)),
        tables=storage.table_bytes(recipe, samples, lengths),
        checkpoints=storage.checkpoint_bytes(student, recipe.train.lora) * recipe.num_rounds,
        pods=pods(recipe, active),
        object_bytes=check_pods(recipe, active),
        price=given.price,
    )


def sampler_of(recipe: Recipe, shapes: Mapping[str, ModelShape], branch: str) -> ModelShape:
    """The shape of the model that answers a branch's prompts."""
    return shapes[branch if recipe.rollout.sampler == "teacher" else STUDENT]


def stage_memory(
    recipe: Recipe, shapes: Mapping[str, ModelShape], samples: Mapping[str, int], given: Assumptions
) -> dict[str, Memory]:
    """By stage, for the largest model that does it."""
    if recipe.execution == "colocated":
        return {"recover": colocated_memory(recipe, shapes, given)}
    here = [name for name in samples if not recipe.branch(name).is_served]  # a served teacher is on somebody else's GPUs
    samplers = {sampler_of(recipe, shapes, name) for name in (here if recipe.rollout.sampler == "teacher" else samples)}
    judges = {shapes[name] for name in here}
    found = {"train": train_memory(shapes[STUDENT], recipe, given)}
    if judges:
        found = {"score": score_memory(max(judges, key=lambda shape: shape.parameters), recipe, given)} | found
    if samplers:
        found = {"rollout": rollout_memory(max(samplers, key=lambda shape: shape.parameters), recipe, given)} | found
    return found


def stage_work(
    recipe: Recipe,
    shapes: Mapping[str, ModelShape],
    samples: Mapping[str, int],
    lengths: Mapping[str, Lengths],
    memory: Mapping[str, Memory],
    active: int,
    given: Assumptions,
) -> list[Stage]:
    """Of each stage and branch, and what waiting for pods costs."""
    found = []
    for name, count in samples.items():
        sampler, own = sampler_of(recipe, shapes, name), lengths[name]
        decoder = memory.get("rollout") or sampling_memory(recipe, shapes, given)
        together = sequences_together(sampler, recipe, count, own, decoder, given)
        judge = shapes[name] if recipe.score.signal == "full" else None
        served = recipe.branch(name).is_served
        if not (served and recipe.rollout.sampler == "teacher"):
            found.append(rollout_work(sampler, recipe, name, count, own, together, given))
        if not served:
            found.append(score_work(shapes[name], name, count, own, given))
        frozen = recipe.train.lora is not None
        found.append(train_work(shapes[STUDENT], name, count, own, given, judge=judge, frozen=frozen))
    stages = [
        replace(stage, gpus=_together(stage.name, (memory.get(stage.name) or memory["recover"]).gpus, recipe))
        for stage in sorted(found, key=lambda stage: ("rollout", "score", "train").index(stage.name))
    ]
    return [*stages, start_work(recipe, active, {stage: need.gpus or 1 for stage, need in memory.items()}, given)]


def _together(stage: str, gpus: int | None, recipe: Recipe) -> int | None:
    """GPUs that a stage works on at once: of a copy of the model, times a pod's copies, times the shards that share it."""
    return gpus * recipe.rollout.replicas * recipe.shards if gpus and stage in ("rollout", "score") else gpus


def advice(recipe: Recipe, shapes: Mapping[str, ModelShape], found: Estimate, given: Assumptions) -> list[str]:
    """What to turn where a stage fits no number of GPUs, and what the estimate leaves out, as sentences."""
    said = []
    student = shapes[STUDENT]
    misfits = [stage for stage, memory in found.memory.items() if memory.gpus is None]
    together = colocated_advice(recipe, shapes, given) if recipe.execution == "colocated" else None
    if together:
        said.append(together)
    if not given.refills(recipe) and "rollout" in misfits:
        batch = largest_batch(student, recipe, given)
        fits = f"set rollout.batch_size to {batch} (the hours are for that)" if batch else "not even one does"
        said.append(f"{recipe.rollout.batch_size} longest sequences do not fit one GPU: {fits}, or use engine vllm")
    if "train" in misfits:
        lower = "lower rollout.max_new_tokens" if given.checkpointing else "use checkpointing"
        if train_memory(student, recipe, given).gpus is None:
            said.append(f"the activations of one longest sequence do not fit a GPU, and FSDP does not divide them: {lower}")
    if "score" in misfits:
        said.append("a teacher does not fit one GPU: use engine vllm, a larger GPU, or lower rollout.max_new_tokens")
    written = [branch.name for branch in recipe.branches if branch.teacher_prompts]
    if written:
        said.append(f"prompts that the teacher of {', '.join(written)} makes up are not counted")
    return said


def at_limits(recipe: Recipe, lengths: Mapping[str, Lengths]) -> dict[str, Lengths]:
    """The same with every prompt and response as long as the recipe allows."""
    prompt, response = float(recipe.prompts.max_prompt_tokens), float(recipe.rollout.max_new_tokens)
    return {name: replace(own, prompt=prompt, response=response) for name, own in lengths.items()}
