"""Prompts that a teacher makes up, from the recipe to the rollouts: made once a run, and used like any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from camopd import plan as layout
from camopd import propose, workflow
from camopd.plan import Plan
from camopd.records import read_table
from camopd.recover import Session
from camopd.store import Store, join
from tests.integration.runs import weights

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {
    "num_rounds": 2,
    "steps_per_round": 1,
    "method": "mopd",
    "branches.general.num_teacher_prompts": 12,
    "rollout.prompts_per_step": 8,
    "rollout.max_empty_fraction": 1,
}


def prepared(output: Path, **settings: Any) -> Plan:
    store = Store()
    return Plan.load(store, workflow.prepare("micro", {**SMALL, "output": str(output), **settings}, store=store).uri)


def rollouts(plan: Plan, number: int) -> list[dict[str, Any]]:
    path = Path(layout.rollout_uri(plan.rounds[number - 1])) / "rollouts.parquet"
    return [row for row in read_table(path, "rollouts") if row["branch"] == "general"]


@pytest.mark.parametrize(
    ("settings", "made_up"),
    [({"branches.general.teacher_prompts": 0.5}, 2), ({"branches.general.prompts": "teacher"}, 4)],
    ids=["mixed", "alone"],
)
def test_made_once_and_used_by_every_round(settings, made_up, tmp_path) -> None:
    plan, store = prepared(tmp_path, **settings), Store()
    table = Path(layout.teacher_prompts_uri(plan.run_uri, "general"), "prompts.parquet")
    workflow.one_round(plan.rounds[0])
    changed = table.stat().st_mtime_ns
    workflow.one_round(plan.rounds[1])
    prompts = {row["prompt_id"]: row["token_ids"].tolist() for row in read_table(table, "prompts")}
    assert len(prompts) == 12
    assert table.stat().st_mtime_ns == changed
    content_id = store.require(str(table.parent)).content_id
    seen = []
    for number, uri in enumerate(plan.rounds, 1):
        assert store.require(layout.rollout_uri(uri)).inputs["teacher-prompts/general"] == content_id
        rows = rollouts(plan, number)
        of_teacher = [row for row in rows if row["prompt_id"] in prompts]
        assert (len(rows), len(of_teacher)) == (4, made_up)
        assert all(row["prompt_ids"].tolist() == prompts[row["prompt_id"]] for row in of_teacher)
        seen += [row["prompt_id"] for row in rows]
    assert len(set(seen)) == len(seen), "no prompt comes back before all have come"

    together = prepared(tmp_path, execution="colocated", **settings)
    session = Session(together, 1, store)
    for number in (1, 2):
        session.round(number)
    assert weights(together.run_uri) == weights(plan.run_uri)


def test_what_was_killed_or_lost_is_made_again_alike(tmp_path) -> None:
    plan, store = prepared(tmp_path, **{"branches.general.prompts": "teacher"}), Store()
    branch, uri = plan.recipe.branch("general"), layout.teacher_prompts_uri(plan.run_uri, "general")
    first = propose.run(plan, branch, store=store)
    Path(join(uri, "manifest.json")).unlink()  # as a kill before the end leaves it
    assert propose.run(plan, branch, store=store) == first
    shutil.rmtree(uri)
    assert propose.run(plan, branch, store=store) == first
