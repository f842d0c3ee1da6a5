"""GPU memory of ``execution = "colocated"``: one process, so one GPU, and never all of it at the same time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from camopd.config import Recipe
from camopd.estimate.assumptions import GIGA, Assumptions
from camopd.estimate.memory import Memory, alone_parts, fitted, rollout_memory, score_memory, train_parts
from camopd.estimate.shapes import FLOAT32, ModelShape

Shapes = Mapping[str, ModelShape]  # by ``student`` and branch


def teachers_of(recipe: Recipe, shapes: Shapes) -> dict[str, ModelShape]:
    """Shape by location of the teachers that the process holds, each model once; with ``train.lora`` not what lies under the
    adapter, which is the student's own."""
    own = (recipe.student, recipe.base) if recipe.train.lora else ()
    places = {branch.name: recipe.teacher(branch) for branch in recipe.branches if branch.steps}
    return {place: shapes[name] for name, place in places.items() if place not in own}


def phases(recipe: Recipe, shapes: Shapes, given: Assumptions) -> dict[str, dict[str, float]]:
    """Bytes by part while the process samples, scores and trains.

    Always there: the student's weights and moments and each different teacher, in float32, since transformers scores in this
    process. Gradients are there while it trains. vLLM has a copy of the student and its cache while it is awake, and nothing
    asleep; ``transformers`` samples from the weights that train. The full signal keeps the teacher's hidden states of a step's
    responses, at their longest, from scoring to training.
    """
    student, teachers, vllm = shapes["student"], teachers_of(recipe, shapes), given.refills(recipe)
    whole = replace(given, dtype="float32", engine="transformers")
    (state, _), training = train_parts(student, recipe, given), alone_parts(student, recipe, given)
    if recipe.score.signal == "full":
        responses = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt * recipe.rollout.max_new_tokens
        training["teacher's hidden states"] = float(FLOAT32 * responses * student.hidden)
    sampler = rollout_memory(student, recipe, given if vllm else whole)
    sampling = {**sampler.sharded, **sampler.whole}
    weights = sampling.pop("weights")
    if vllm:
        sampling["sampling copy"] = weights
    judges = [score_memory(shapes[branch.name], recipe, whole).whole for branch in recipe.branches if branch.steps]
    scoring = max(judges, key=lambda parts: sum(parts.values()))
    lora = recipe.train.lora
    gradients = float(FLOAT32 * (student.parameters if lora is None else student.adapter(lora)))
    held = {"state": state["state"] - gradients, "teachers": float(FLOAT32 * sum(own.parameters for own in teachers.values()))}
    return {"sample": {**held, **sampling}, "score": {**held, **scoring}, "train": {**held, **state, **training}}


def colocated_memory(recipe: Recipe, shapes: Shapes, given: Assumptions) -> Memory:
    """The largest of ``phases``, which one GPU holds, or none does."""
    largest = max(phases(recipe, shapes, given).values(), key=lambda parts: sum(parts.values()))
    return fitted({}, largest, given.usable_bytes, divisible=1)


def sampling_memory(recipe: Recipe, shapes: Shapes, given: Assumptions) -> Memory:
    """What decoding has beside its cache, for ``work.sequences_together``; the cache takes the rest."""
    parts = phases(recipe, shapes, given)["sample"]
    weights = parts.pop("sampling copy", 0.0)
    del parts["cache"]
    return fitted({"weights": weights}, parts, given.usable_bytes, divisible=1)


def colocated_advice(recipe: Recipe, shapes: Shapes, given: Assumptions) -> str | None:
    """What to turn where no GPU holds it; else the largest ``vllm.gpu_memory_utilization`` that leaves room for the others."""
    found = phases(recipe, shapes, given)
    sizes = {phase: sum(parts.values()) for phase, parts in found.items()}
    if max(sizes.values()) > given.usable_bytes:
        said = ", ".join(f"{size / GIGA:,.0f} GB to {phase}" for phase, size in sizes.items())
        return f'one GPU must hold it all: {said}; take a larger one, lower the limits, or use execution "staged"'
    if not given.refills(recipe):
        return None
    kept = found["sample"]["state"] + found["sample"]["teachers"]
    share = math.floor(100 * (1 - given.reserve) * (1 - kept / given.usable_bytes)) / 100
    return f"set vllm.gpu_memory_utilization to {share:g} at most: student and teachers keep {kept / GIGA:,.0f} GB meanwhile"
