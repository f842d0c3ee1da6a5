"""A response of 32,768 tokens: its loss against float64, and the memory of an update as it is foreseen and as it is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from camopd.config import Recipe, load_recipe
from camopd.engines.packing import use_packing
from camopd.estimate.assumptions import Assumptions
from camopd.estimate.memory import alone_parts, train_parts
from camopd.estimate.shapes import ModelShape, read_shape
from camopd.student import Student
from camopd.update import make_optimizer, micro_batches, rows_loss, update
from tests.reference import SHARED
from tests.tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from cost import LiveStorage
from on_shapes import count_update, make_model, make_row, on_shapes

LONG = 32_768


# --- The loss -------------------------------------------------------------------------------------------------------------


def exact_loss(rows: list[dict], recipe: Recipe) -> float:
    """Section 2 with the sampled token, in float64, each sample alone, from all logits at once."""
    model, total = tiny_model(max_length=LONG + 8).double(), 0.0
    for row in rows:
        ids = torch.from_numpy(np.concatenate([row["prompt_ids"], row["response_ids"]]).astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None, :-1], use_cache=False).logits[0, len(row["prompt_ids"]) - 1 :, :SHARED]
        own = logits.log_softmax(-1).gather(1, ids[len(row["prompt_ids"]) :, None]).squeeze(1).numpy()
        ratio = np.exp(own - row["logprobs"].astype(np.float64))
        weight = np.where((ratio >= recipe.train.ratio_low) & (ratio <= recipe.train.ratio_high), ratio, 0.0)
        total -= (weight * (row["teacher_logprobs"] - own) * own).mean()
    return recipe.branch("general").scale * total / len(rows)


@pytest.mark.slow
def test_a_response_longer_than_the_budget_has_a_pass_of_its_own_and_the_right_loss() -> None:
    """Beside shorter ones, with layers computed again."""
    recipe = load_recipe("micro", {"score.signal": "sampled", "train.activation_checkpointing": True})
    assert recipe.train.batch_tokens < LONG
    rng = np.random.default_rng(0)
    rows = [make_row(5, length, SHARED) for length in (300, LONG, 40)]
    for row in rows:
        row["logprobs"] = rng.normal(-3, 1.5, len(row["logprobs"])).astype(np.float32)
        row["teacher_logprobs"] = rng.normal(-3, 1, len(row["logprobs"])).astype(np.float32)
    batches = micro_batches(rows, recipe.train.batch_tokens)
    assert sorted([len(row["response_ids"]) for row in batch] for batch in batches) == [[40, 300], [LONG]]
    model = use_packing(tiny_model(max_length=LONG + 8))
    student = Student(model, recipe.train)
    numbers = update(student, make_optimizer(model, recipe), rows, recipe=recipe, vocab_size=SHARED)
    assert 0.05 < numbers["kept_ratio"] < 0.95
    assert numbers["loss"] == pytest.approx(
        exact_loss(rows, recipe), rel=2e-4
    )  # a token or two are within rounding of the limits


# --- Memory ---------------------------------------------------------------------------------------------------------------

SIZES = {
    "model_type": "qwen3",
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
}


def recipe_for(response: int, **train: object) -> Recipe:
    settings = {"score.signal": "sampled", "prompts.max_prompt_tokens": 50, "rollout.max_new_tokens": response}
    return load_recipe("micro", settings | {f"train.{key}": value for key, value in ({"logits_mib": 1} | train).items()})


def foreseen(shape: ModelShape, recipe: Recipe) -> float:
    """What one process needs beside its state."""
    train = recipe.train
    given = Assumptions(dtype=train.precision, checkpointing=train.activation_checkpointing)
    parts = train_parts(shape, recipe, given)[1] if train.num_processes > 1 else alone_parts(shape, recipe, given)
    return sum(parts.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "response", "checkpointing", "precision"),
    [
        (1, 50, True, "bfloat16"),
        (1, 4000, False, "bfloat16"),
        (2, 4000, True, "bfloat16"),
        (8, 4000, False, "bfloat16"),
        (4, 2000, True, "float32"),
    ],
)
def test_the_peak_of_an_update_is_foreseen_on_one_process_and_on_several(
    num_processes: int, response: int, checkpointing: bool, precision: str
) -> None:
    """Where activations are what is large, and where weights are."""
    given = {"num_processes": num_processes, "activation_checkpointing": checkpointing, "precision": precision}
    recipe = recipe_for(response, batch_tokens=1, **given)
    shape = read_shape(SIZES, "small")
    found = count_update(SIZES, recipe, 50, response)
    assert found.state * num_processes == pytest.approx(16 * shape.parameters, rel=1e-3)
    assert (found.peak - found.state) / foreseen(shape, recipe) == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_counted_on_shapes_is_what_is_alive_with_numbers(checkpointing: bool) -> None:
    recipe = recipe_for(300, precision="bfloat16", activation_checkpointing=checkpointing)
    rows = [make_row(20, 300, 2000)]

    def backward(student: Student) -> None:
        student.backward(lambda model: rows_loss(model, rows, recipe=recipe, vocab_size=2000, num_selected=1))

    student = Student(make_model(SIZES), recipe.train)
    with LiveStorage(list(student.parameters())) as live:
        backward(student)
    with on_shapes() as counter:
        student = Student(make_model(SIZES), recipe.train)
        before = counter.peak = counter.alive
        backward(student)
    assert counter.peak - before == pytest.approx(live.peak, rel=0.01)


def test_the_8b_recipe_fits_eight_cards_of_80_gb_at_its_longest() -> None:
    """What `camopd plan` says of the recipe's limits; benchmarks/long_response.py counts it."""
    from long_response import CONFIG, RECIPE

    recipe, shape = load_recipe(RECIPE), read_shape(CONFIG, "Qwen3-8B")
    assert (recipe.rollout.max_new_tokens, recipe.train.num_processes) == (LONG, 8)
    state, beside = train_parts(shape, recipe, Assumptions())
    assert sum(state.values()) / 8 + sum(beside.values()) < Assumptions().usable_bytes
    shorter = train_parts(shape, load_recipe(RECIPE, {"rollout.max_new_tokens": LONG // 2}), Assumptions())[1]
    assert beside["activations"] / shorter["activations"] == pytest.approx((LONG + 4096) / (LONG // 2 + 4096))
