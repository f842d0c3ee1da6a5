"""Tokens, operations and GPU time of a run by stage, at mean lengths.

Every sequence is counted as if it had its branch's mean length. Attention grows with the square, so with lengths that differ
much its true part is larger; at 4,000 tokens it is a thirteenth of the forward pass of an 8B model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from camopd.config import Recipe
from camopd.estimate.assumptions import Assumptions, Lengths
from camopd.estimate.memory import Memory, largest_batch
from camopd.estimate.shapes import ModelShape, causal_pairs
from camopd.schedule import Schedule

BACKWARD_MATRIX = 2  # times the forward pass: gradients of inputs and of weights
BACKWARD_ATTENTION = 2.5  # flash kernels compute q.k again: five products for two (Dao 2023, arXiv:2307.08691, section 4.1)


@dataclass(frozen=True)
class BranchTokens:
    """What a branch asks of a whole run.

    Attributes:
        samples: responses sampled, and scored.
        trained: of these, left by selection.
        prompt: tokens of all sampled prompts.
        response: tokens of all sampled responses.
        forward: tokens that go through the student's update forward, trained x (prompt + response - 1).
        backward: of these, positions that carry a loss: trained x response.
    """

    samples: int
    trained: float
    prompt: float
    response: float
    forward: float
    backward: float


@dataclass(frozen=True)
class Stage:
    """The work of a stage over the whole run.

    Attributes:
        name: ``rollout``, ``score``, ``train`` or ``pod starts``.
        branch: where it belongs to one.
        tokens: that go through a model forward.
        flops: executed, recomputation included.
        gpu_seconds: on as many GPUs as it may be spread over.
        gpus: that work at once: the least that hold the stage, or the mean of the pods that start; None where none hold it.
    """

    name: str
    branch: str
    tokens: float
    flops: float
    gpu_seconds: float
    gpus: float | None = None


def num_steps(recipe: Recipe) -> int:
    """Optimiser steps of the whole run."""
    return recipe.num_rounds * recipe.steps_per_round


def samples_of(recipe: Recipe, steps: int, start: int = 0) -> dict[str, int]:
    """Responses by branch of so many optimiser steps, from the schedule: prompts x ``samples_per_prompt``."""
    begin, end = Schedule.of(recipe, start), Schedule.of(recipe, start + steps)
    counts = {branch.name: end.taken(branch.name) - begin.taken(branch.name) for branch in recipe.branches}
    return {name: count * recipe.rollout.samples_per_prompt for name, count in counts.items() if count}


def scored_branches(recipe: Recipe) -> int:
    """Scoring tasks of the whole run: branches with prompts, summed over the rounds."""
    per = recipe.steps_per_round
    return sum(len(samples_of(recipe, per, number * per)) for number in range(recipe.num_rounds))


def branch_tokens(samples: int, lengths: Lengths) -> BranchTokens:
    """The tokens of so many samples of one branch."""
    trained = samples * lengths.kept
    return BranchTokens(
        samples=samples,
        trained=trained,
        prompt=samples * lengths.prompt,
        response=samples * lengths.response,
        forward=trained * (lengths.prompt + lengths.response - 1),
        backward=trained * lengths.response,
    )


# --- Operations of one sequence -------------------------------------------------------------------------------------------


def forward_flops(shape: ModelShape, tokens: float, pairs: float, predicted: float) -> float:
    """One forward pass: every token through the layers' matrices, every pair through attention, logits where wanted."""
    return shape.token_flops * tokens + shape.pair_flops * pairs + shape.head_flops * predicted


def train_flops(
    shape: ModelShape, tokens: float, pairs: float, predicted: float, *, checkpointing: bool, frozen: bool = False
) -> float:
    """Forward and backward pass of an update: matrices 3 times the forward, attention 3.5 times, and each once more with
    checkpointing; the output layer 3 times, since the chunked loss computes nothing twice (losses.py). torch stops short of
    each layer's last product when it computes again, I D of its matrices, which is counted here all the same.

    Frozen under an adapter, matrices and output layer have no gradient of their own: once less. The adapter is left out.
    """
    again, matrix = int(checkpointing), BACKWARD_MATRIX - int(frozen)
    matrices = (1 + matrix + again) * shape.token_flops * tokens
    attention = (1 + BACKWARD_ATTENTION + again) * shape.pair_flops * pairs
    return matrices + attention + (1 + matrix) * shape.head_flops * predicted


# --- Stages ---------------------------------------------------------------------------------------------------------------


def sequences_together(
    shape: ModelShape, recipe: Recipe, samples: int, lengths: Lengths, memory: Memory, given: Assumptions
) -> float:
    """Sequences that one copy of the model decodes together: ``rollout.batch_size``, but no more than the branch samples at
    once and than the memory holds: of the longest, or, where the engine refills, of prompt + response / 2 mean tokens."""
    turns = recipe.num_rounds if recipe.execution == "staged" else num_steps(recipe)
    wanted = min(recipe.rollout.batch_size, samples / turns / recipe.rollout.replicas)
    if not given.refills(recipe):
        return min(wanted, max(largest_batch(shape, recipe, given), 1))
    if memory.gpus is None:
        return wanted
    free = given.usable_bytes * memory.gpus - sum(memory.whole.values()) * memory.gpus - memory.sharded["weights"]
    fit = free / ((lengths.prompt + lengths.response / 2) * shape.cache_bytes(given.width))
    return max(min(wanted, fit), 1)


def rollout_work(
    shape: ModelShape, recipe: Recipe, branch: str, samples: int, lengths: Lengths, together: float, given: Assumptions
) -> Stage:
    """Prompts at the reached peak; then decoding, at the slower of memory and arithmetic.

    Decoding reads the weights once a step, and each sequence's cache at each of its tokens, prompt + response / 2 of it on
    average. Steps: all response tokens / sequences together where the engine refills; otherwise batches x the longest response,
    taken as the recipe's limit, since one of a batch nearly always reaches it.
    """
    prompt, response = lengths.prompt, lengths.response
    seen = causal_pairs(prompt)
    fill = samples * forward_flops(shape, prompt, seen, 1)
    rest = causal_pairs(prompt + response - 1) - seen
    decode = samples * forward_flops(shape, response - 1, rest, response - 1)
    refilled = samples * response / together
    steps = refilled if given.refills(recipe) else math.ceil(samples / together) * recipe.rollout.max_new_tokens
    cache = samples * response * (prompt + response / 2) * shape.cache_bytes(given.width)
    reads = steps * shape.parameters * given.width + cache
    seconds = fill / given.flops + max(reads / given.bytes_per_second, decode / given.flops)
    return Stage("rollout", branch, samples * (prompt + response - 1), fill + decode, seconds)


def score_work(shape: ModelShape, branch: str, samples: int, lengths: Lengths, given: Assumptions) -> Stage:
    """One forward pass over prompt and response, with the logits of the response."""
    length = lengths.prompt + lengths.response - 1
    flops = samples * forward_flops(shape, length, causal_pairs(length), lengths.response)
    return Stage("score", branch, samples * length, flops, flops / given.flops)


def train_work(
    shape: ModelShape,
    branch: str,
    samples: int,
    lengths: Lengths,
    given: Assumptions,
    *,
    judge: ModelShape | None = None,
    frozen: bool = False,
) -> Stage:
    """Forward and backward pass over the selected samples; with the full signal the logits of ``judge`` come on top."""
    length = lengths.prompt + lengths.response - 1
    pairs, again = causal_pairs(length), given.checkpointing
    own = train_flops(shape, length, pairs, lengths.response, checkpointing=again, frozen=frozen)
    trained = samples * lengths.kept
    flops = trained * (own + (judge.head_flops if judge else 0) * lengths.response)
    return Stage("train", branch, trained * length, flops, flops / given.flops)


def start_work(recipe: Recipe, active: int, gpus: Mapping[str, int], given: Assumptions) -> Stage:
    """GPUs that wait while pods start and load: for one rollout and one update a round, one scoring task a branch.

    Args:
        recipe: the recipe.
        active: scoring tasks of the whole run.
        gpus: of a copy of the model, by stage; none where a server does the work.
        given: assumptions.
    """
    rounds = recipe.num_rounds
    counts = {"recover": 1} if recipe.execution == "colocated" else {"rollout": rounds, "score": active, "train": rounds}
    together = dict.fromkeys(("rollout", "score"), recipe.rollout.replicas * recipe.shards)
    waiting = sum(count * gpus.get(stage, 0) * together.get(stage, 1) for stage, count in counts.items())
    return Stage("pod starts", "", 0, 0, waiting * given.start_minutes * 60, waiting / sum(counts.values()))
