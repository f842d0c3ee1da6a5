"""Every preset against the table of method section 5: what it declares, and what one update with it does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from camopd.config import Recipe
from camopd.plan import Plan
from camopd.presets import presets
from camopd.schedule import Schedule
from camopd.select import select_rows
from camopd.student import Student
from camopd.train import Trainer, selected_rows
from camopd.update import make_optimizer
from tests.reference import SHARED, Advantage, K, keep_by_mass, make_rows, make_teachers, output_weights, step_loss
from tests.tiny import tiny_model

BATCH = 8  # prompts of a step
GENERAL, DOMAIN = {"general": BATCH}, {"domain": BATCH}
HALVES, QUARTERS = {"general": 4, "domain": 4}, {"general": 6, "domain": 2}


def gap(q: float, p: float) -> float:
    return math.log(q / p)


def floored(q: float, p: float) -> float:
    return max(math.log(q / p), math.log(0.1) / 0.9)


def accepted(q: float, p: float) -> float:
    return (min(q / p, 1) + 0.01 * (1 - min(q / p, 1))) * math.log(q / p)


@dataclass(frozen=True)
class Entry:
    """A row of the table, written from the papers: nothing here may be read off the preset.

    Attributes:
        cycle: prompts by branch of each step, for batches of ``BATCH``.
        scale: factor r_b of (general, domain).
        mass: gap mass that is kept of (general, domain).
        advantage: of the probabilities under teacher and student.
        off_policy: the teachers answer, and nothing is importance-weighted.
        signals: what its advantage is defined for.
    """

    cycle: list[Mapping[str, int]]
    scale: tuple[float, float] = (1.0, 1.0)
    mass: tuple[float, float] = (1.0, 1.0)
    advantage: Advantage = gap
    off_policy: bool = False
    signals: tuple[str, ...] = ("sampled", "topk", "full")


TABLE = {
    "mopd": Entry([HALVES]),
    "mopd-3to1": Entry([QUARTERS]),
    "alternating": Entry([GENERAL, GENERAL, GENERAL, DOMAIN]),
    "alternating-scaled": Entry([GENERAL, GENERAL, GENERAL, DOMAIN], scale=(2.0, 1.0)),
    "selection": Entry([HALVES], mass=(0.8, 0.8)),
    "camopd": Entry([GENERAL, GENERAL, GENERAL, DOMAIN], scale=(2.0, 1.0), mass=(0.8, 0.8)),
    "general-only": Entry([GENERAL]),
    "relaxed": Entry([HALVES], advantage=floored),
    "selectkd": Entry([HALVES], advantage=accepted),
    "off-policy-kd": Entry([HALVES], advantage=lambda q, p: 1.0, off_policy=True, signals=("sampled",)),
}
CASES = [(name, signal) for name, entry in TABLE.items() for signal in entry.signals]


def make_recipe(method: str, **changes) -> Recipe:
    values = {
        "method": method,
        "student": "/models/domain",
        "execution": "colocated",
        "branches": [
            {"name": "general", "role": "recover", "teacher": "/models/general", "prompts": "/g.jsonl"},
            {"name": "domain", "role": "retain", "prompts": "/d.jsonl"},
        ],
        "rollout": {"prompts_per_step": BATCH},
        "train": {"batch_tokens": 24, "max_grad_norm": 1e9, "learning_rate": 1e-12, "max_engine_gap": 10},
    }
    return Recipe.model_validate({**values, **changes})


def make_plan(recipe: Recipe) -> Plan:
    return Plan("/runs/x", recipe, {}, SHARED, (2,), 0, {"general": 50, "domain": 50}, "t", 32)


def test_the_table_has_every_preset() -> None:
    missing, gone = presets().keys() - TABLE.keys(), TABLE.keys() - presets().keys()
    assert not missing, (
        f"no entry for {', '.join(sorted(missing))}: add what its paper says to TABLE in tests/test_presets.py (the cycle, "
        "scale and mass of its row in method section 5, and its advantage as a function of two probabilities)"
    )
    assert not gone, f"TABLE in tests/test_presets.py has {', '.join(sorted(gone))}, and src/camopd/presets/ has not"


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_gets_what_the_table_says(name: str) -> None:
    entry, recipe = TABLE[name], make_recipe(name)
    assert list(Schedule.of(recipe).cycle) == entry.cycle
    assert tuple(branch.scale for branch in recipe.branches) == entry.scale
    assert tuple(branch.mass for branch in recipe.branches) == entry.mass
    assert [branch.score for branch in recipe.branches] == ["absolute", "positive"]
    assert recipe.rollout.sampler == ("teacher" if entry.off_policy else "student")
    assert presets()[name].signals == entry.signals


@pytest.mark.parametrize("name", TABLE)
def test_a_docstring_says_where_a_preset_comes_from(name: str) -> None:
    text = (Path(__file__).parents[1] / f"src/camopd/presets/{name.replace('-', '_')}.py").read_text().split('"""')[1]
    assert "arXiv:" in text or "method section" in text


@pytest.mark.parametrize(("name", "signal"), CASES)
def test_an_update_has_the_loss_and_the_gradients_of_the_formula(name: str, signal: str) -> None:
    """Every different step of the cycle: selection, weights, advantages, means, and each parameter's gradient."""
    entry, recipe = TABLE[name], make_recipe(name, score={"signal": signal, "top_k": K})
    places = {tuple(prompts.items()): step for step, prompts in reversed(list(enumerate(entry.cycle)))}
    for step in places.values():
        check_step(entry, recipe, step)


@pytest.mark.parametrize("name", ["camopd", "relaxed", "selectkd"])
def test_the_student_s_own_tokens_may_be_asked_for(name: str) -> None:
    recipe = make_recipe(name, score={"signal": "topk", "top_k": K, "top_k_of": "student"})
    check_step(TABLE[name], recipe, 0)


def check_step(entry: Entry, recipe: Recipe, step: int) -> None:
    """One update of the trainer against the formula."""
    torch.set_num_threads(1)
    plan = make_plan(recipe)
    rollouts, scored = make_rows(entry.cycle[step], step=step, top_k_of=recipe.score.top_k_of)
    chosen = selected_rows(rollouts, scored, select_rows(rollouts, scored, plan))[step]
    model = tiny_model()
    trainer = Trainer(plan, Student(model, recipe.train), make_optimizer(model, recipe), Path(), Schedule.of(recipe, step))
    trainer.teacher_weights = output_weights()
    record = trainer.step(rollouts, chosen)

    kept = []
    for number, branch in enumerate(("general", "domain")):
        own = ([row for row in rows if row["branch"] == branch] for rows in (rollouts, scored))
        kept += keep_by_mass(*own, entry.mass[number], positive=branch == "domain")
    reference = tiny_model().double()
    loss = step_loss(
        reference,
        kept,
        signal=recipe.score.signal,
        advantage=entry.advantage,
        scale=dict(zip(("general", "domain"), entry.scale, strict=True)),
        teachers=make_teachers(),
        limits=None if entry.off_policy else (0.5, 2.0),
    )
    loss.backward()
    assert {branch: own["num_selected"] for branch, own in record["branches"].items()} == {
        branch: sum(row["branch"] == branch for row in kept) for branch in entry.cycle[step]
    }
    assert len(kept) == len(rollouts) if entry.mass == (1, 1) else len(kept) < len(rollouts)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["kept_ratio"] == 1 if entry.off_policy else 0 < record["kept_ratio"] < 1
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )
    norm = math.sqrt(sum((parameter.grad**2).sum().item() for parameter in reference.parameters()))
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_a_preset_with_zero_steps_leaves_a_branch_out() -> None:
    """Alternating or mixed: a recipe may say more than its preset."""
    assert Schedule.of(make_recipe("general-only", mixing="mixed")).cycle == (GENERAL,)
