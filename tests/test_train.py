"""One update against the formula in float64; what a step records; state that survives a save; the alarms."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from camopd.checkpoint import load_state, snapshot
from camopd.config import Branch, Recipe
from camopd.engines.transformers import TransformersEngine
from camopd.errors import StoreError, UnhealthyRunError
from camopd.group import Group
from camopd.plan import STEPS, Plan, is_companion
from camopd.schedule import Schedule
from camopd.store import Store
from camopd.student import Student
from camopd.train import (
    Trainer,
    check_fresh,
    headline,
    selected_rows,
)
from camopd.update import batch_numbers, make_optimizer, update
from tests.reference import SHARED, K, exact, make_rows, make_teachers, output_weights, step_loss
from tests.tiny import tiny_model

SIGNALS = ["sampled", "topk", "full"]


def make_recipe(signal: str = "sampled", **train) -> Recipe:
    return Recipe(
        student="/models/domain",
        execution="colocated",
        branches=(
            Branch(name="general", role="recover", teacher="/models/general", prompts="/g.jsonl", steps=3, scale=2.0),
            Branch(name="domain", role="retain", prompts="/d.jsonl"),
        ),
        score={"signal": signal, "top_k": K},
        train={"batch_tokens": 24, **train},
    )


def make_batch(seed: int = 0, drift: float = 0.8, **counts: int) -> list[dict]:
    """Selected rows of one step, each with what its teacher says."""
    rollouts, scored = make_rows(counts or {"general": 3, "domain": 3}, seed=seed, drift=drift)
    return [{**row, **teacher, "kept": True} for row, teacher in zip(rollouts, scored, strict=True)]


def make_trainer(recipe: Recipe, run_uri: str = "/runs/x", source: Path = Path()) -> Trainer:
    model = tiny_model()
    plan = Plan(run_uri, recipe, {}, SHARED, (2,), 0, {"general": 50, "domain": 50}, "t", 32)
    return Trainer(plan, Student(model, recipe.train), make_optimizer(model, recipe), source, Schedule.of(recipe))


# --- One update -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("batch_tokens", [8, 10_000])
def test_update_has_the_loss_and_gradient_of_the_formula(signal: str, batch_tokens: int) -> None:
    """Both branches in one batch, however it is cut into passes, with limits of its own."""
    limits = {"ratio_low": 0.7, "ratio_high": 1.5}
    recipe = make_recipe(signal, batch_tokens=batch_tokens, max_grad_norm=1e9, learning_rate=1e-12, **limits)
    rows, weights, model = make_batch(), output_weights(), tiny_model()
    numbers = update(
        Student(model, recipe.train),
        make_optimizer(model, recipe),
        rows,
        recipe=recipe,
        vocab_size=SHARED,
        teacher_weights=weights,
    )
    reference = tiny_model().double()
    loss = step_loss(
        reference,
        rows,
        signal=signal,
        advantage=lambda q, p: math.log(q / p),
        scale={"general": 2.0, "domain": 1.0},
        teachers=make_teachers(),
        limits=(0.7, 1.5),
    )
    loss.backward()
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert 0 < numbers["kept_ratio"] < 1  # both sides of the mask are exercised
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=2e-5, rtol=1e-3, msg=name)
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in reference.parameters()))
    assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_update_reports_means_over_tokens_of_all_and_of_each_branch() -> None:
    rows, model, recipe = make_batch(), tiny_model(), make_recipe(learning_rate=1e-12)
    numbers = update(Student(model, recipe.train), make_optimizer(model, recipe), rows, recipe=recipe, vocab_size=SHARED)
    drift, gaps = {"general": [], "domain": []}, {"general": [], "domain": []}
    for row in rows:
        own = np.log(exact(tiny_model().double(), row).detach().numpy())[range(len(row["response_ids"])), row["response_ids"]]
        drift[row["branch"]] += list(own - row["logprobs"])
        gaps[row["branch"]] += list(np.abs(row["teacher_logprobs"] - own))
    assert numbers["engine_gap"] == pytest.approx(np.abs(drift["general"] + drift["domain"]).mean(), rel=1e-4)
    for name, own in numbers["branches"].items():
        kept = np.abs(drift[name]) <= math.log(2)
        assert own["kept_ratio"] == pytest.approx(kept.mean(), rel=1e-6)
        assert own["gap"] == pytest.approx(np.mean(gaps[name]), rel=1e-4)


def test_a_teacher_equal_to_the_student_changes_nothing() -> None:
    """Loss and gradient are exactly zero, so the frozen copy cannot move the student at step 0."""
    model, recipe = tiny_model(), make_recipe()
    (row,) = make_batch(general=1)
    engine = TransformersEngine(model, vocab_size=SHARED, batch_size=1, batch_tokens=100)
    ((_, scores),) = engine.score([row["prompt_ids"]], [row["response_ids"]])
    own = scores.logprobs
    row |= {"teacher_logprobs": own, "logprobs": own}
    before = [p.detach().clone() for p in model.parameters()]
    numbers = update(Student(model, recipe.train), make_optimizer(model, recipe), [row], recipe=recipe, vocab_size=SHARED)
    gap = numbers["branches"]["general"]["gap"]
    assert (numbers["loss"], numbers["grad_norm"], gap, numbers["kept_ratio"]) == (0, 0, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_updates_close_the_gap_to_the_teacher() -> None:
    """The gradient points toward the teacher: on fixed rows the teacher's tokens become as likely as the teacher has them."""
    recipe = make_recipe("topk", learning_rate=1e-2, ratio_low=0.0, ratio_high=1e9)
    rows, model = make_batch(general=2), tiny_model()
    optimizer = make_optimizer(model, recipe)
    gaps = [
        update(Student(model, recipe.train), optimizer, rows, recipe=recipe, vocab_size=SHARED)["branches"]["general"]["gap"]
        for _ in range(40)
    ]
    assert gaps[-1] < 0.2 * gaps[0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_parameters_change(broken: float) -> None:
    model, recipe, rows = tiny_model(), make_recipe(), make_batch()
    rows[1]["teacher_logprobs"][0] = broken
    rows[1]["logprobs"][:] = -1e-3
    recipe = make_recipe(ratio_low=0.0, ratio_high=1e9)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UnhealthyRunError, match="not finite"):
        update(Student(model, recipe.train), make_optimizer(model, recipe), rows, recipe=recipe, vocab_size=SHARED)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_stale_weights_are_told_from_rounding() -> None:
    check_fresh(0.02, 0.1)
    with pytest.raises(UnhealthyRunError, match="max_engine_gap"):
        check_fresh(0.2, 0.1)


# --- Steps and their records ----------------------------------------------------------------------------------------------


def test_a_step_trains_on_what_was_kept_and_records_all_that_was_sampled() -> None:
    trainer = make_trainer(make_recipe(max_engine_gap=10))
    rows = make_batch(general=3, domain=2)
    for row in rows:
        row["kept"] = row["branch"] == "general"
    unscored = {"branch": "domain", "response_ids": np.array([2], np.int32), "finish_reason": "length"}
    record = trainer.step([*rows, unscored], rows)
    assert (record["step"], trainer.schedule.step) == (0, 1)
    assert record["tokens"] == sum(len(row["response_ids"]) for row in rows[:3])
    general, domain = record["branches"]["general"], record["branches"]["domain"]
    assert (general["num_samples"], general["num_selected"], general["token_share"]) == (3, 3, 1)
    assert (domain["num_samples"], domain["num_selected"], domain["tokens"], domain["token_share"]) == (3, 0, 0, 0)
    assert domain["cut_share"] == pytest.approx(1 / 3)
    assert (domain["gap"], domain["kept_ratio"]) == (0, 1)  # nothing was trained on, so there is nothing to average
    assert json.loads(json.dumps(record)) == record


def test_a_step_without_anything_to_train_on_stops_the_run() -> None:
    trainer = make_trainer(make_recipe())
    rows = [row | {"kept": False} for row in make_batch()]
    for kept in ([], rows):
        with pytest.raises(UnhealthyRunError, match="step 0 has no response"):
            trainer.step(rows, kept)


def test_weights_are_compared_before_the_first_update_of_a_round_alone() -> None:
    """Later in a round the student has moved away from the engine that sampled, which is no fault."""
    trainer = make_trainer(make_recipe(max_engine_gap=0.1))
    trainer.step(make_batch(drift=0.01), make_batch(drift=0.01))
    trainer.step(make_batch(drift=0.8), make_batch(drift=0.8))
    with pytest.raises(UnhealthyRunError, match="max_engine_gap"):
        make_trainer(make_recipe(max_engine_gap=0.1)).step(make_batch(drift=0.8), make_batch(drift=0.8))


def test_looking_at_the_gradients_changes_no_weight() -> None:
    """Every second update here; the branch that is not active is seen through its latest batch."""
    torch.set_num_threads(1)
    trainers = {every: make_trainer(make_recipe(max_engine_gap=10, diagnose_every=every)) for every in (0, 2)}
    for trainer in trainers.values():
        for counts in ({"general": 3}, {"domain": 3}, {"general": 2}):
            rows = make_batch(**counts)
            trainer.step(rows, rows)
    assert [["diagnostics" in record for record in t.records] for t in trainers.values()] == [[False] * 3, [False, True, False]]
    assert -1 <= trainers[2].records[1]["diagnostics"]["gradient/cosine_domain_general"] <= 1
    weights = (t.model.parameters() for t in trainers.values())
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_counts_of_a_step_by_hand() -> None:
    def row(branch: str, length: int, reason: str = "stop") -> dict:
        return {"branch": branch, "response_ids": [0] * length, "finish_reason": reason}

    batch = [row("general", 4, "length"), row("general", 2), row("domain", 6)]
    assert batch_numbers(batch, batch[1:]) == {
        "general": {
            "num_samples": 2,
            "num_selected": 1,
            "tokens": 2,
            "token_share": 0.25,
            "mean_length": 3,
            "cut_share": 0.5,
        },
        "domain": {"num_samples": 1, "num_selected": 1, "tokens": 6, "token_share": 0.75, "mean_length": 6, "cut_share": 0},
    }


def test_headline_numbers_are_means_over_the_steps_that_a_branch_was_in() -> None:
    def step(gap: float, *names: str) -> dict:
        own = {"gap": gap, "kept_ratio": 1.0, "topk_mass": 0.5, "mean_length": 2.0, "num_selected": 3}
        whole = {"loss": gap, "grad_norm": 1.0, "kept_ratio": 1.0, "entropy": 0.5, "engine_gap": gap, "tokens": 10}
        return {**whole, "branches": dict.fromkeys(names, own)}

    numbers = headline([step(1.0, "general"), step(2.0, "general"), step(6.0, "domain")])
    assert (numbers["general/gap"], numbers["domain/gap"], numbers["loss"]) == (1.5, 6.0, 3.0)
    assert (numbers["engine_gap"], numbers["tokens"], numbers["num_steps"]) == (1.0, 30, 3)


# --- State between rounds -------------------------------------------------------------------------------------------------


def test_a_saved_trainer_goes_on_bit_for_bit(tmp_path) -> None:
    recipe, rows = make_recipe(learning_rate=1e-2), make_batch()
    torch.set_num_threads(1)

    def steps(model, optimizer, count):
        for _ in range(count):
            update(Student(model, recipe.train), optimizer, rows, recipe=recipe, vocab_size=SHARED)

    unbroken = tiny_model()
    optimizer = make_optimizer(unbroken, recipe)
    steps(unbroken, optimizer, 3)

    student = tmp_path / "student"
    student.mkdir()
    (student / "tokenizer.json").write_text("{}")
    first = tiny_model()
    optimizer = make_optimizer(first, recipe)
    steps(first, optimizer, 2)
    snapshot(first, optimizer, Schedule.of(recipe, 2), seed=0).write(tmp_path / "saved", Group(), student=student)

    resumed = type(first).from_pretrained(tmp_path / "saved").eval()
    optimizer = make_optimizer(resumed, recipe)
    assert load_state(tmp_path / "saved", resumed, optimizer) == 2
    steps(resumed, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"


def test_state_of_another_model_is_refused(tmp_path) -> None:
    recipe, model = make_recipe(), tiny_model()
    (tmp_path / "student").mkdir()
    taken = snapshot(model, make_optimizer(model, recipe), Schedule.of(recipe), seed=0)
    taken.write(tmp_path / "c", Group(), student=tmp_path / "student")
    with pytest.raises(StoreError, match="another model"):
        load_state(tmp_path / "c", model, make_optimizer(model, recipe))


def test_saving_writes_the_records_since_the_last_save(tmp_path) -> None:
    (tmp_path / "student").mkdir()
    trainer = make_trainer(make_recipe(), str(tmp_path / "run"), tmp_path / "student")
    rows = make_batch(drift=0.01)
    for name, steps in (("a", 2), ("b", 1)):
        for _ in range(steps):
            trainer.step(rows, rows)
        numbers = trainer.save(tmp_path / name, Store())
        records = json.loads((tmp_path / name / STEPS).read_text())
        assert (numbers["num_steps"], len(records)) == (steps, steps)
        assert json.loads((tmp_path / name / "trainer" / "state.json").read_text())["step"] == trainer.schedule.step
    assert [record["step"] for record in records] == [2]


def test_companions_are_the_tokenizer_s_files() -> None:
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "merges.txt"]
    left = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "manifest.json",
        "steps.json",
    ]
    assert [name for name in kept + left if is_companion(name)] == kept


def test_rows_are_joined_by_key_and_never_by_place() -> None:
    def row(branch, prompt_id, step, **more):
        return {"branch": branch, "prompt_id": prompt_id, "sample_index": 0, "step": step} | more

    rollouts = [row("general", "a", 0, logprobs=[1]), row("general", "b", 0, logprobs=[2]), row("domain", "a", 1, logprobs=[3])]
    scored = [
        row("domain", "a", 1, teacher_logprobs=[30]),
        row("general", "b", 0, teacher_logprobs=[20]),
        row("general", "a", 0, teacher_logprobs=[10]),
    ]
    selection = [row("general", "b", 0, kept=True), row("general", "a", 0, kept=False), row("domain", "a", 1, kept=True)]
    chosen = selected_rows(rollouts, scored, selection)
    assert {s: [(r["logprobs"], r["teacher_logprobs"], r["kept"]) for r in rows] for s, rows in chosen.items()} == {
        0: [([1], [10], False), ([2], [20], True)],
        1: [([3], [30], True)],
    }
    assert selected_rows(rollouts, scored, []) == {}
