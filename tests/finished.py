"""A run's folder as the stages leave it, without models: the numbers are made up, the manifests are real."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camopd import plan as layout
from camopd.config import Recipe
from camopd.evaluate import evaluation_uri
from camopd.plan import Plan
from camopd.store import Manifest, Store, digest, join

STEPS = [
    {"step": 0, "loss": 0.75, "grad_norm": 2.0, "branches": {"general": {"gap": 0.5, "tokens": 100}}},
    {
        "step": 1,
        "loss": 0.25,
        "grad_norm": 1.0,
        "branches": {"domain": {"gap": 0.125, "tokens": 80}},
        "diagnostics": {"parameters": "all parameters", "gradient/cosine_domain_general": -0.25, "general/gcg": 12.5},
    },
]


def make_plan(output: str, store: Store, *, seed: int = 0, **settings: Any) -> Plan:
    """A prepared run of two branches; ``settings`` go into the recipe."""
    branches = [
        {
            "name": "general",
            "role": "recover",
            "teacher": "/models/general",
            "prompts": "/data/general.jsonl",
            "tasks": ["seen"],
        },
        {"name": "domain", "role": "retain", "prompts": "/data/domain.jsonl", "tasks": ["codes"]},
    ]
    values = {"student": "/models/domain", "output": output, "num_rounds": 2, "seed": seed, "branches": branches}
    recipe = Recipe.model_validate({**values, "evaluate": {"curve_points": 0}, **settings})
    names = ("student", "teacher/general", "teacher/domain", "prompts/general", "prompts/domain")
    content_ids = {name: digest(name) for name in names}
    run_uri = join(output, layout.run_id(recipe, content_ids))
    plan = Plan(run_uri, recipe, content_ids, 64, (1,), 0, {"general": 10, "domain": 5}, digest("template"), 96)
    store.write(join(run_uri, "recipe.json"), recipe.model_dump_json().encode())
    produce(store, layout.plan_uri(run_uri), "prepare", {"plan.json": plan.to_json(), "settings.md": "# Settings\n"})
    return plan


def make_round(plan: Plan, store: Store, number: int, *, steps: Sequence[Mapping[str, Any]] = STEPS) -> Manifest:
    """A finished round; its optimiser steps are numbered on from the round before."""
    uri = layout.round_uri(plan.run_uri, number)
    produce(store, layout.rollout_uri(uri), "rollout", {"rollouts.parquet": f"{uri}"}, {"mean_length": 12.5})
    for branch in plan.recipe.branches:
        produce(store, layout.score_uri(uri, branch.name), "score", {"scored.parquet": uri + branch.name}, {"mean_gap": 0.5})
    produce(store, layout.select_uri(uri), "select", {"selection.parquet": uri}, {"general": {"kept": 0.5}})
    own = [{**step, "step": step["step"] + len(steps) * (number - 1)} for step in steps]
    files = {"model.safetensors": f"weights {plan.recipe.seed} {number}", "steps.json": json.dumps(own)}
    return produce(store, layout.checkpoint_uri(uri), "train", files, {"general/loss": 0.75})


def make_evaluation(plan: Plan, store: Store, *, passed: bool = True) -> str:
    """The evaluation of the last round; returns its prefix."""
    uri = evaluation_uri(plan, store)
    last = store.require(layout.checkpoint_uri(plan.rounds[-1])).content_id
    reasons = ["general recovered 0.61 (0.55 to 0.70)"] if passed else ["domain retained 0.80, below 0.95"]
    numbers = {"recovered_general": 0.61, "recovered_general_low": 0.55, "recovered_general_high": 0.70}
    models = {"before": ("domain model before", 0), "after": ("recovered model after", plan.recipe.num_rounds)}
    score = {branch.name: {"value": 0.5, "low": 0.4, "high": 0.6} for branch in plan.recipe.branches}
    record = {
        "headline": numbers,
        "decision": {"passed": passed, "reasons": reasons},
        "models": {key: {"label": label, "round": number} for key, (label, number) in models.items()},
        "branches": [{"name": branch.name} for branch in plan.recipe.branches],
        "scores": {key: {"branches": score} for key in models},
        "recovered": {"general": {"value": 0.61, "low": 0.55, "high": 0.70}},
        "retained": {},
    }
    files = {"evaluation.json": json.dumps(record), "report.html": "<html>report</html>", "samples.parquet": "rows"}
    produce(store, uri, "evaluate", files, numbers, {"after": last})
    return uri


def make_run(output: str, store: Store, *, passed: bool = True, **settings: Any) -> Plan:
    """A run of two rounds, evaluated."""
    plan = make_plan(output, store, **settings)
    for number in range(1, plan.recipe.num_rounds + 1):
        make_round(plan, store, number)
    make_evaluation(plan, store, passed=passed)
    return plan


def produce(
    store: Store,
    uri: str,
    stage: str,
    files: Mapping[str, str],
    metrics: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Manifest:
    def write(folder: Path) -> Mapping[str, Any]:
        for name, text in files.items():
            (folder / name).write_text(text)
        return metrics or {}

    return store.produce(uri, stage=stage, config={}, inputs=inputs or {}, write=write)
