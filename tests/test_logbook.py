"""What is told about a run: names, values, series, and the entries in the order in which they came to be."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd import rounds
from camopd.plan import Plan
from camopd.store import Store
from camopd.tracking import logbook
from camopd.tracking.logbook import canonical_text, params_of, safe_name, step_points
from tests.finished import STEPS, make_evaluation, make_plan, make_round, make_run


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("acc(%)", "acc_pct"),
        ("general/loss", "general/loss"),
        ("a//b/../c", "a/b/c"),
        ("tokens/s [mean]", "tokens/s _mean"),
        ("/", "unnamed"),
        ("x" * 300, "x" * 250),
    ],
)
def test_safe_name(text: str, name: str) -> None:
    assert safe_name(text) == name


@given(st.text())
def test_safe_name_is_what_mlflow_takes(text: str) -> None:
    import posixpath
    import re

    name = safe_name(text)
    assert re.fullmatch(r"[/\w.\- :]{1,250}", name)  # mlflow.utils.validation.validate_param_and_metric_name
    assert name == posixpath.normpath(name)
    assert not name.startswith(("/", ".."))
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "same", [["1e-6", "1e-06", 0.000001, 1e-6], ["3", 3, 3.0, "3.0"], [True, "true"], [("a", 1.0), "a, 1"]]
)
def test_one_text_for_one_value(same: list[object]) -> None:
    assert len({canonical_text(value) for value in same}) == 1


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_canonical_text_keeps_the_number(value: float) -> None:
    assert float(canonical_text(value)) == value


def test_a_long_parameter_is_whole_in_a_file() -> None:
    params, files = params_of({"notes": "n" * 7000, "short": "s" * 6000})
    assert params["short"] == "s" * 6000
    assert len(params["notes"]) < 400
    assert "7000 characters" in params["notes"]
    assert files == {"params/notes.txt": "n" * 7000}
    assert params_of({"notes": "n" * 6999 + "m"})[0] != params  # told apart by the hash


def test_step_points_count_what_is_not_finite() -> None:
    steps = [
        {"step": 4, "loss": 2.0, "branches": {"general": {"kl": "Infinity", "note": "text", "cut": True}}},
        {"step": 5, "loss": 1.0, "branches": {"general": {"gap": 0.5}, "domain": {"kl": math.nan, "gap": 0.25}}},
        {
            "step": 6,
            "loss": 0.5,
            "branches": {},
            "diagnostics": {"parameters": "a.0, a.9", "gradient/dot_a_b": -1.5, "a/gcg": 7},
        },
    ]
    points, nonfinite_steps, names = step_points(steps, time_ms=7)
    assert {(p.name, p.value, p.step, p.time_ms) for p in points} == {
        ("loss", 2.0, 4, 7),
        ("general/cut", 1.0, 4, 7),
        ("loss", 1.0, 5, 7),
        ("general/gap", 0.5, 5, 7),
        ("domain/gap", 0.25, 5, 7),
        ("loss", 0.5, 6, 7),
        ("gradient/dot_a_b", -1.5, 6, 7),
        ("a/gcg", 7.0, 6, 7),
    }
    assert (nonfinite_steps, names) == (2, {"general/kl", "domain/kl"})


def test_entries_follow_the_store(tmp_path: Path) -> None:
    store = Store()
    plan = make_plan(str(tmp_path), store)

    def keys() -> list[str]:
        return [entry.key.partition("-")[0] if entry.key[0] == "e" else entry.key for entry in logbook.entries(plan, store)]

    assert keys() == ["settings", "plan"]
    make_round(plan, store, 1)
    make_round(plan, store, 2)
    assert keys() == ["settings", "plan", "round-0001", "round-0002"]
    make_evaluation(plan, store)
    assert keys() == ["settings", "plan", "round-0001", "round-0002", "evaluation", "ledger"]


def test_a_round_tells_steps_and_stages(tmp_path: Path) -> None:
    store = Store()
    plan = make_plan(str(tmp_path), store)
    branches = {"general": {**STEPS[0]["branches"]["general"], "kl": "NaN"}}
    make_round(plan, store, 1, steps=[{**STEPS[0], "branches": branches}, STEPS[1]])
    entry = next(entry for entry in logbook.entries(plan, store) if entry.nested)
    facts = entry.facts()
    series = {(p.name, p.step): p.value for p in facts.points}
    assert series["loss", 0] == 0.75
    assert series["general/gap", 0] == 0.5
    assert series["domain/gap", 1] == 0.125
    assert series["gradient/cosine_domain_general", 1] == -0.25
    summary = {p.name: (p.value, p.step) for p in facts.summary}
    assert summary["rollout/mean_length"] == (12.5, 1)
    assert summary["select/general/kept"] == (0.5, 1)
    assert summary["train/general/loss"] == (0.75, 1)
    assert summary["token_share/general"] == (100 / 180, 1)
    assert summary["nonfinite_steps"] == (1.0, 1)
    assert facts.tags["camopd.nonfinite"] == "general/kl"
    assert facts.began_ms is not None
    assert facts.ended_ms is not None
    assert facts.began_ms <= facts.ended_ms


def test_a_round_tells_throughput_and_how_long_its_stages_waited_for_the_store(tmp_path: Path) -> None:
    """A gathered rollout took no time worth a word: it brings the share that its shards waited."""
    store = Store()
    plan = make_plan(str(tmp_path), store)
    make_round(plan, store, 1)
    of_shards = {"waiting_share": 0.125, "tokens_per_second": 900.0}
    for stage, metrics in (("rollout", of_shards), ("train", {"tokens_per_second": 300.0})):
        path = Path(plan.rounds[0], stage, "manifest.json")
        made = json.loads(path.read_text())
        path.write_text(json.dumps(made | {"seconds": 10.0, "seconds_waited": 2.5, "metrics": metrics}))
    entry = next(entry for entry in logbook.entries(plan, store) if entry.nested)
    summary = {p.name: p.value for p in entry.facts().summary}
    assert (summary["rollout/waiting_share"], summary["rollout/tokens_per_second"]) == (0.125, 900.0)
    assert (summary["train/waiting_share"], summary["train/tokens_per_second"]) == (0.25, 300.0)
    assert summary["train/seconds"] == 10.0


def test_a_round_tells_what_is_there(tmp_path: Path) -> None:
    """In one process a round leaves its checkpoint alone; of stages, a branch without a step in the round has no scores."""
    store = Store()
    plan = make_plan(str(tmp_path), store)
    make_round(plan, store, 1)

    def told_without(*names: str) -> set[str]:
        for name in names:
            shutil.rmtree(Path(plan.rounds[0], name))
        facts = next(entry for entry in logbook.entries(plan, store) if entry.nested).facts()
        assert facts.began_ms is not None
        assert {name.removeprefix("camopd.content_id.") for name in facts.tags} & set(names) == set()
        return {point.name.partition("/")[0] for point in facts.summary} - {"token_share", "nonfinite_steps"}

    assert told_without("score-domain") == {"rollout", "score-general", "select", "train"}
    assert told_without("rollout", "score-general", "select") == {"train"}


def test_prompts_that_a_teacher_makes_up_are_no_data_set(tmp_path: Path) -> None:
    store = Store()
    plan = make_plan(str(tmp_path), store)
    general = plan.recipe.branches[0].model_copy(update={"prompts": "teacher"})
    recipe = plan.recipe.model_copy(update={"branches": (general, plan.recipe.branches[1])})
    made = Plan(
        **{**vars(plan), "recipe": recipe, "content_ids": {k: v for k, v in plan.content_ids.items() if k != "prompts/general"}}
    )
    facts = next(entry for entry in logbook.entries(made, store) if entry.key == "plan").facts()
    assert [dataset.name for dataset in facts.datasets] == ["prompts-domain"]


def test_settings_hold_no_tracking_uri(tmp_path: Path) -> None:
    store = Store()
    plan = make_plan(str(tmp_path), store, tracking={"uri": "http://mlflow.internal:5000"}, notes="n" * 6001)
    facts = next(iter(logbook.entries(plan, store))).facts()
    assert facts.params["train.learning_rate"] == "2e-06"
    assert facts.params["branches.general.mass"] == "0.8"
    assert facts.params["branches.domain.teacher"] == "none"
    assert set(facts.files) == {"recipe.json", "params/notes.txt"}
    assert "mlflow.internal" not in str(facts)


def test_status(tmp_path: Path) -> None:
    store = Store()
    plan = make_run(str(tmp_path), store)
    assert logbook.status(plan, store) == "FINISHED"
    more = Plan(**{**vars(plan), "recipe": plan.recipe.model_copy(update={"num_rounds": 3})})
    assert logbook.status(more, store) == "RUNNING"
    rounds.record_stop(plan.run_uri, stage="train", round_number=2, reason="the loss is not finite", store=store)
    assert logbook.status(plan, store) == "FAILED"
    stop = next(entry for entry in logbook.entries(plan, store) if entry.key == "stop")
    assert stop.facts().tags == {"camopd.stopped": "round 2, train: the loss is not finite"}


def test_identity_names_place_inputs_and_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KFP_RUN_ID", "0b1c")
    monkeypatch.setenv("CAMOPD_GIT_SHA", "abc123")
    monkeypatch.delenv("CAMOPD_IMAGE_DIGEST", raising=False)
    plan = make_plan("./runs", Store())
    identity = logbook.identity(plan)
    assert identity.run_uri == str(tmp_path / "runs" / identity.run_id)
    assert identity.tags["kfp.run_id"] == "0b1c"
    assert identity.tags["mlflow.source.git.commit"] == "abc123"
    assert identity.tags["camopd.content_id.teacher/general"] == plan.content_ids["teacher/general"]
    assert "camopd.image_digest" not in identity.tags
