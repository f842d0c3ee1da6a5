"""GPU memory of each stage, for the longest prompt and response that the recipe allows: what does not hold these will fail.

Symbols as in ``camopd.estimate.shapes``; P parameters, S = longest prompt + longest response, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from camopd.config import Recipe
from camopd.estimate.assumptions import Assumptions
from camopd.estimate.shapes import FLOAT32, ModelShape

MIB = 2**20
FROZEN = FLOAT32  # bytes of a parameter under an adapter that learns
STATE = 4 * FLOAT32  # bytes of a trained parameter: itself, its gradient and AdamW's two moments, all float32 (update.py)
LOSS = 5  # times train.logits_mib that the chunked loss takes (losses.chunked_objective; benchmarks/cost.py counts it)
SCORE_LOGITS = 3 * 64 * MIB  # logits, their log-softmax and one temporary of engines.transformers.LOGITS_MIB
ROOM = 1.5  # a full key-value cache grows by half (engines/cache.py)
DRAW = 20  # bytes a vocabulary entry of a decoding step: three float32 tensors, and the cumulative sum in float64
PREFILL = 8192  # prompt tokens that vLLM computes at once: max_num_batched_tokens of its server on a large GPU


@dataclass(frozen=True)
class Memory:
    """What a stage needs.

    Attributes:
        sharded: bytes by part that G GPUs divide among themselves.
        whole: bytes by part that each of them holds.
        gpus: the smallest G whose memory holds it; None when the whole parts alone are too large, or it cannot be divided.
    """

    sharded: Mapping[str, float]
    whole: Mapping[str, float]
    gpus: int | None

    def on_each(self, gpus: int) -> float:
        """Bytes on each of so many GPUs."""
        return sum(self.sharded.values()) / gpus + sum(self.whole.values())


def fitted(sharded: Mapping[str, float], whole: Mapping[str, float], usable: float, *, divisible: int | None = None) -> Memory:
    """The memory with the smallest G for which sharded / G + whole fits.

    Args:
        sharded: bytes by part.
        whole: bytes by part.
        usable: bytes of one GPU.
        divisible: G must divide this (the query heads, in tensor parallel); 1 is a single GPU, None any number.
    """
    room = usable - sum(whole.values())
    least = max(math.ceil(sum(sharded.values()) / room), 1) if room > 0 else None
    if least is not None and divisible is not None:
        least = next((count for count in range(least, divisible + 1) if divisible % count == 0), None)
    return Memory(sharded, whole, least)


def longest(recipe: Recipe) -> int:
    """S."""
    return recipe.prompts.max_prompt_tokens + recipe.rollout.max_new_tokens


def micro_batch(budget: int, recipe: Recipe) -> int:
    """Tokens of the largest micro-batch (``token_batches``): the budget, at least one longest sequence, at most a step."""
    step = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
    return max(min(budget, step * longest(recipe)), longest(recipe))


def rollout_memory(shape: ModelShape, recipe: Recipe, given: Assumptions) -> Memory:
    """Weights P w, key-value cache, logits, and the prompts' first pass.

    ``transformers``: ``rollout.batch_size`` caches of S tokens with their room, all prompts of the batch at once, one GPU.
    ``vllm``: tensor parallel, at least one cache of S tokens; what is left over takes more.
    """
    width, batch = given.width, recipe.rollout.batch_size
    cache = longest(recipe) * shape.cache_bytes(width)
    weights = {"weights": float(shape.parameters * width)}
    if given.refills(recipe):
        logits = DRAW * batch * shape.vocab_size
        whole = {"first pass": float(PREFILL * shape.passing_bytes(width)), "logits": float(logits)}
        return fitted(weights | {"cache": float(cache)}, whole, given.usable_bytes, divisible=shape.heads)
    prompts = batch * recipe.prompts.max_prompt_tokens
    first = {"first pass": float(prompts * shape.passing_bytes(width))}
    parts = weights | {"cache": ROOM * batch * cache, "logits": float(DRAW * batch * shape.vocab_size)} | first
    return fitted({}, parts, given.usable_bytes, divisible=1)


def largest_batch(shape: ModelShape, recipe: Recipe, given: Assumptions) -> int:
    """The largest ``rollout.batch_size`` of longest sequences on one GPU with ``transformers``; 0 when none fits."""
    width = given.width
    one = ROOM * longest(recipe) * shape.cache_bytes(width) + DRAW * shape.vocab_size
    one += recipe.prompts.max_prompt_tokens * shape.passing_bytes(width)
    return max(int((given.usable_bytes - shape.parameters * width) // one), 0)


def score_memory(shape: ModelShape, recipe: Recipe, given: Assumptions) -> Memory:
    """Weights P w, the passing activations of a micro-batch and of its last hidden states, and the logits of a few positions.

    ``transformers`` scores on one GPU; with ``vllm`` the weights are divided.
    """
    tokens = micro_batch(recipe.score.batch_tokens, recipe)
    passing = tokens * (shape.passing_bytes(given.width) + given.width * shape.hidden)
    weights, whole = {"weights": float(shape.parameters * given.width)}, {"activations": float(passing), "logits": SCORE_LOGITS}
    divisible = shape.heads if given.refills(recipe) else 1
    return fitted(weights, whole, given.usable_bytes, divisible=divisible)


def passing_parts(shape: ModelShape, recipe: Recipe, given: Assumptions) -> dict[str, float]:
    """What a micro-batch of T tokens holds on its GPU while the backward pass is at its largest, but for copies of weights.

    - activations: T (N s + o) without and T (N w D + o) with checkpointing (s and o: ``saved_bytes`` and ``outer_bytes``), and
      four times the hidden states, T 4 w D: at the loss, their gradients, and both where a layer begins its backward pass;
    - working: what a layer needs while it goes backward, T w I, with checkpointing T s more; or, if it is larger, what the loss
      needs: its logits and the output layer's gradient in float32, or that gradient while it is rounded;
    - head gradient: the loss's gradient of the output layer, V D w.
    """
    width, tokens = given.width, micro_batch(recipe.train.batch_tokens, recipe)
    layer, residual, inner = shape.saved_bytes(width), width * shape.hidden, width * shape.intermediate
    kept, again = (shape.layers * residual, layer) if given.checkpointing else (shape.layers * layer, 0)
    head, exact = width * shape.head, FLOAT32 * shape.head
    if recipe.train.lora is not None:  # the output layer is frozen
        head = exact = 0
    loss = max(LOSS * recipe.train.logits_mib * MIB + exact - head, exact if width < FLOAT32 else 0)
    found = {
        "activations": float(tokens * (kept + shape.outer_bytes(width) + 4 * residual)),
        "working": float(max(tokens * (again + inner), loss)),
        "head gradient": float(head),
    }
    return {name: size for name, size in found.items() if size}


def train_parts(shape: ModelShape, recipe: Recipe, given: Assumptions) -> tuple[dict[str, float], dict[str, float]]:
    """What an update holds: divided by FSDP, and on each GPU.

    Divided: the state, 16 P; gradients stay from one micro-batch to the next. With ``train.lora`` 4 P, and 16 bytes for each
    parameter of the adapter; nothing else then has a gradient. On each, whichever is larger:

    - ``passing_parts``, and gathered: the parameters outside the layers, and two layers with their gradients;
    - at the end, when the activations are gone, last gradients: those of the parameters outside the layers as they were made,
      w, and in float32 to be summed over the GPUs. (With two GPUs, or a tied output layer, up to a fifth more.)
    """
    width, lora = given.width, recipe.train.lora
    layers = 4 if lora is None else 2
    passing = passing_parts(shape, recipe, given) | {"gathered": float(width * (shape.outside + layers * shape.block))}
    if lora is not None:
        return {"state": float(FROZEN * shape.parameters + STATE * shape.adapter(lora))}, passing
    ending = {"last gradients": float((FLOAT32 + width) * shape.outside)}
    return {"state": float(STATE * shape.parameters)}, _larger(passing, ending)


def alone_parts(shape: ModelShape, recipe: Recipe, given: Assumptions) -> dict[str, float]:
    """What an update holds beside its state on one GPU alone, which needs no FSDP (student.py).

    In bfloat16 there is a rounded copy of all parameters, P w, whose gradients are widened to float32 at the very end: all of
    them wait for that, P w, and the largest one is there in either type. Frozen ones have none.
    """
    passing = passing_parts(shape, recipe, given)
    if given.width == FLOAT32:
        return passing
    rounded = {"rounded weights": float(given.width * shape.parameters)}
    if recipe.train.lora is not None:
        return rounded | passing
    ending = {"their gradients": float(given.width * shape.parameters), "last gradient": float(FLOAT32 * shape.head)}
    return rounded | _larger(passing, ending)


def _larger(*parts: Mapping[str, float]) -> dict[str, float]:
    largest: Mapping[str, float] = max(parts, key=lambda part: sum(part.values()))
    return dict(largest)


def train_memory(shape: ModelShape, recipe: Recipe, given: Assumptions) -> Memory:
    """See ``train_parts``, and ``alone_parts`` where one GPU is enough."""
    state, whole = train_parts(shape, recipe, given)
    alone = Memory(state, alone_parts(shape, recipe, given), 1)
    if alone.on_each(1) <= given.usable_bytes:
        return alone
    held = fitted(state, whole, given.usable_bytes)
    return replace(held, gpus=2) if held.gpus == 1 else held
