"""One update against an independent float64 computation; state that survives a save; the two alarms."""

import math
import random

import pytest
import torch

from camopd.config import Branch, Recipe
from camopd.engines.transformers import output_head, response_logprobs
from camopd.errors import StoreError, UnhealthyRunError
from camopd.schedule import Schedule
from camopd.train import check_fresh, is_companion, load_state, make_optimizer, save_checkpoint, selected_rows, update
from tests.tiny import VOCAB, tiny_model

SHARED = VOCAB - 4
CHUNKS = {"logprob_chunk": 5, "batch_tokens": 24}


def make_recipe(**train) -> Recipe:
    signal = train.pop("signal", "sampled")
    return Recipe(
        student="/models/domain",
        branches=(
            Branch(name="general", role="recover", teacher="/models/general", prompts="/g.jsonl", steps=3, scale=2.0),
            Branch(name="domain", role="retain", prompts="/d.jsonl"),
        ),
        score={"signal": signal, "top_k": 3},
        train=CHUNKS | train,
    )


def make_rows(count: int = 6, *, seed: int = 0, branches=("general",), drift: float = 0.4):
    """Random prompts and responses with an engine that has drifted a little and a teacher of its own."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        length = rng.randint(1, 6)
        rows.append(
            {
                "branch": branches[index % len(branches)],
                "prompt_ids": [rng.randrange(SHARED) for _ in range(rng.randint(1, 5))],
                "response_ids": [rng.randrange(SHARED) for _ in range(length)],
                "teacher_logprobs": [-rng.uniform(0.1, 3) for _ in range(length)],
                "topk_ids": [rng.sample(range(SHARED), 3) for _ in range(length)],
                "topk_logprobs": [[math.log(0.5), math.log(0.2), math.log(0.1)]] * length,
                "tail_mass": [0.2] * length,
            }
        )
    model = tiny_model()
    for row in rows:
        own = exact(model.double(), row)[range(len(row["response_ids"])), row["response_ids"]]
        row["logprobs"] = [value + rng.uniform(-drift, drift) * 2 for value in own.tolist()]
    return rows


def exact(model, row):
    """The student's log-probabilities (L, SHARED) for one row, float64, no padding, with gradient."""
    ids = torch.tensor([[*row["prompt_ids"], *row["response_ids"]]])
    return model(ids, use_cache=False).logits[0, len(row["prompt_ids"]) - 1 : -1, :SHARED].log_softmax(-1)


def reference_loss(model, rows, recipe):
    """Section 2 of the method, written as it is printed, one token at a time."""
    total = 0
    for row in rows:
        logp = exact(model, row)
        inner = 0
        for t, token in enumerate(row["response_ids"]):
            own = logp[t, token]
            ratio = math.exp(own.item() - row["logprobs"][t])
            weight = ratio if recipe.train.ratio_low <= ratio <= recipe.train.ratio_high else 0.0
            if recipe.score.signal == "sampled":
                advantage = row["teacher_logprobs"][t] - own.item()
                inner = inner - weight * recipe.branch(row["branch"]).scale * advantage * own
            elif weight > 0:
                top = logp[t, row["topk_ids"][t]]
                rest = 1 - top.exp().sum()
                kl = (top.exp() * (top - torch.tensor(row["topk_logprobs"][t]).double())).sum()
                inner = inner + recipe.branch(row["branch"]).scale * (kl + rest * (rest.log() - math.log(row["tail_mass"][t])))
        total = total + inner / len(row["response_ids"])
    return total / len(rows)


@pytest.mark.parametrize("signal", ["sampled", "topk"])
@pytest.mark.parametrize("batch_tokens", [8, 10_000])
def test_update_has_the_loss_and_gradient_of_the_formula(signal, batch_tokens) -> None:
    recipe = make_recipe(signal=signal, batch_tokens=batch_tokens, max_grad_norm=1e9, learning_rate=1e-12)
    rows = make_rows(branches=("general", "domain"))
    reference = tiny_model().double()
    loss = reference_loss(reference, rows, recipe)
    loss.backward()
    model = tiny_model()
    numbers = update(model, output_head(model), make_optimizer(model, recipe), rows, recipe=recipe, vocab_size=SHARED)
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert 0 < numbers["kept_ratio"] < 1  # both sides of the mask are exercised
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=2e-5, rtol=1e-3, msg=name)
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in reference.parameters()))
    assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_a_teacher_equal_to_the_student_changes_nothing() -> None:
    """Loss and gradient are exactly zero, so the frozen copy cannot move the student at step 0."""
    model, recipe, row = tiny_model(), make_recipe(), make_rows(1)[0]
    head = output_head(model)
    own = response_logprobs(model, head, [row["prompt_ids"]], [row["response_ids"]], vocab_size=SHARED, chunk=5).sampled_T
    row |= {"teacher_logprobs": own.tolist(), "logprobs": own.tolist()}
    before = [p.detach().clone() for p in model.parameters()]
    numbers = update(model, head, make_optimizer(model, recipe), [row], recipe=recipe, vocab_size=SHARED)
    assert (numbers["loss"], numbers["grad_norm"], numbers["gap"], numbers["kept_ratio"]) == (0, 0, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_updates_close_the_gap_to_the_teacher() -> None:
    """The gradient points toward the teacher: on fixed rows the teacher's tokens become as likely as the teacher has them."""
    recipe = make_recipe(signal="topk", learning_rate=1e-2, ratio_low=0.0, ratio_high=1e9)
    rows, model = make_rows(2), tiny_model()
    optimizer, head = make_optimizer(model, recipe), output_head(model)
    gaps = [update(model, head, optimizer, rows, recipe=recipe, vocab_size=SHARED)["gap"] for _ in range(40)]
    assert gaps[-1] < 0.2 * gaps[0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_parameters_change(broken) -> None:
    model, recipe, rows = tiny_model(), make_recipe(), make_rows(3)
    rows[1]["teacher_logprobs"][0] = broken
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UnhealthyRunError, match="not finite"):
        update(model, output_head(model), make_optimizer(model, recipe), rows, recipe=recipe, vocab_size=SHARED)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_stale_weights_are_told_from_rounding() -> None:
    check_fresh(0.02, 0.1)
    with pytest.raises(UnhealthyRunError, match="max_engine_gap"):
        check_fresh(0.2, 0.1)


def test_a_saved_trainer_goes_on_bit_for_bit(tmp_path) -> None:
    recipe, rows = make_recipe(learning_rate=1e-2), make_rows()
    torch.set_num_threads(1)

    def steps(model, optimizer, count):
        for _ in range(count):
            update(model, output_head(model), optimizer, rows, recipe=recipe, vocab_size=SHARED)

    unbroken = tiny_model()
    optimizer = make_optimizer(unbroken, recipe)
    steps(unbroken, optimizer, 3)

    student = tmp_path / "student"
    student.mkdir()
    (student / "tokenizer.json").write_text("{}")
    first = tiny_model()
    optimizer = make_optimizer(first, recipe)
    steps(first, optimizer, 2)
    save_checkpoint(tmp_path / "saved", first, optimizer, Schedule.of(recipe.branches, 2), seed=0, student=student)

    resumed = type(first).from_pretrained(tmp_path / "saved").eval()
    optimizer = make_optimizer(resumed, recipe)
    assert load_state(tmp_path / "saved", resumed, optimizer) == 2
    steps(resumed, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"


def test_state_of_another_model_is_refused(tmp_path) -> None:
    recipe, model = make_recipe(), tiny_model()
    (tmp_path / "student").mkdir()
    save_checkpoint(
        tmp_path / "c", model, make_optimizer(model, recipe), Schedule.of(recipe.branches), seed=0, student=tmp_path / "student"
    )
    with pytest.raises(StoreError, match="another model"):
        load_state(tmp_path / "c", model, make_optimizer(model, recipe))


def test_companions_are_the_tokenizer_s_files() -> None:
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "merges.txt"]
    left = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "manifest.json",
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
    assert {s: [(r["logprobs"], r["teacher_logprobs"]) for r in rows] for s, rows in chosen.items()} == {
        0: [([2], [20])],
        1: [([3], [30])],
    }
