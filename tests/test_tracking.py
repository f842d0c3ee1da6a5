"""Sync follows the store: what is missing is sent, once, whatever happened before. Against real MLflow, sqlite and server."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from camopd import tracking
from camopd.config import Tracking
from camopd.errors import StoreError
from camopd.plan import Plan
from camopd.store import Store, join
from camopd.tracking import NullTracker, SyncResult, Tracker, alias_at_start, alias_snapshot, sync, tracker_for
from tests.finished import make_evaluation, make_plan, make_round, make_run
from tests.fixtures.mlflow_server import Proxy

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@pytest.fixture(autouse=True)
def _no_tracking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "KFP_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"mlflow_{request.param}")


@pytest.fixture
def experiment() -> str:
    return f"experiment-{uuid4().hex}"


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def plan(tmp_path: Path, store: Store) -> Iterator[Plan]:
    """A prepared run."""
    return make_plan(str(tmp_path / "runs"), store)


def open_tracker(uri: str, experiment: str) -> Tracker:
    return tracker_for(Tracking(uri=uri, experiment=experiment))


def client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def runs(uri: str, experiment: str) -> tuple[list[Run], list[Run]]:
    """The recovery's runs and the nested ones, the oldest first."""
    known = client(uri).get_experiment_by_name(experiment)
    assert known is not None
    found = client(uri).search_runs([known.experiment_id], order_by=["attributes.start_time ASC"])
    return (
        [run for run in found if "mlflow.parentRunId" not in run.data.tags],
        [run for run in found if "mlflow.parentRunId" in run.data.tags],
    )


def series(uri: str, run: Run) -> dict[str, list[tuple[int, float]]]:
    """Every point of every metric of a run."""
    return {
        name: sorted((point.step, point.value) for point in client(uri).get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }


# --- No tracking ----------------------------------------------------------------------------------------------------------


def test_without_a_uri_nothing_is_tracked(plan: Plan, store: Store) -> None:
    tracker = tracker_for(Tracking())
    assert isinstance(tracker, NullTracker)
    assert sync(plan.run_uri, store=store, tracker=tracker) == SyncResult()
    alias_snapshot(plan.run_uri, store=store, tracker=tracker)
    assert not alias_at_start(plan, store).known
    assert store.stat(join(plan.run_uri, "registry.json")) is None  # so that a later prepare, with tracking, can ask


def test_recipe_goes_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    assert tracker_for(Tracking()).uri == "http://environment:5000"
    assert tracker_for(Tracking(uri="http://recipe:5000")).uri == "http://recipe:5000"


def test_snapshot_of_another_name_is_unknown(plan: Plan, store: Store) -> None:
    record = {"model_name": "other", "alias": plan.recipe.promote.alias, "known": True, "version": 3}
    store.write(join(plan.run_uri, "registry.json"), json.dumps(record).encode())
    assert not alias_at_start(plan, store).known


# --- What MLflow gets -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_followed_from_stage_to_stage(uri: str, experiment: str, plan: Plan, store: Store) -> None:
    tracker = open_tracker(uri, experiment)
    assert sync(plan.run_uri, store=store, tracker=tracker).sent == ("settings", "plan")
    (parent,), nested = runs(uri, experiment)
    assert parent.info.status == "RUNNING"
    assert nested == []
    assert parent.data.params["train.learning_rate"] == "2e-06"
    inputs = {
        item.dataset.name: (item.dataset.digest, json.loads(item.dataset.source)["uri"])
        for item in parent.inputs.dataset_inputs
    }
    assert set(inputs) == {"prompts-general", "prompts-domain"}
    digest, source = inputs["prompts-general"]
    assert plan.content_ids["prompts/general"].removeprefix("sha256:").startswith(digest)
    assert source == "/data/general.jsonl"

    for number in (1, 2):
        make_round(plan, store, number)
        assert sync(plan.run_uri, store=store, tracker=tracker).sent == (f"round-000{number}",)
    make_evaluation(plan, store, passed=False)
    assert sync(plan.run_uri, store=store, tracker=tracker).sent[0].startswith("evaluation-")

    (parent,), nested = runs(uri, experiment)
    assert parent.info.status == "FINISHED"
    nested.sort(key=lambda run: run.info.run_name)
    assert [run.info.run_name for run in nested] == ["round-0001", "round-0002"]
    assert [run.data.tags["camopd.round"] for run in nested] == ["1", "2"]
    assert {run.info.status for run in nested} == {"FINISHED"}
    assert series(uri, nested[1])["general/gap"] == [(2, 0.5)]  # the step counts over all rounds
    assert series(uri, nested[1])["gradient/cosine_domain_general"] == [(3, -0.25)]
    assert series(uri, parent)["train/general/loss"] == [(1, 0.75), (2, 0.75)]
    assert series(uri, parent)["evaluation/recovered_general"] == [(2, 0.61)]
    assert parent.data.tags["camopd.decision"] == "fail"
    assert parent.data.tags["camopd.reasons"] == "domain retained 0.80, below 0.95"
    assert parent.data.tags["camopd.content_id.student"] == plan.content_ids["student"]
    files = {file.path for file in client(uri).list_artifacts(parent.info.run_id)}
    assert files == {"recipe.json", "settings.md", "report.html", "evaluation.json", "ledger.json"}


@pytest.mark.slow
def test_a_second_sync_sends_nothing(uri: str, experiment: str, tmp_path: Path, store: Store) -> None:
    plan = make_run(str(tmp_path / "runs"), store)
    first = sync(plan.run_uri, store=store, tracker=open_tracker(uri, experiment))
    assert len(first.sent) == 6
    before = [series(uri, run) for part in runs(uri, experiment) for run in part]
    assert sync(plan.run_uri, store=store, tracker=open_tracker(uri, experiment)) == SyncResult()
    assert [series(uri, run) for part in runs(uri, experiment) for run in part] == before


@pytest.mark.slow
def test_an_attempt_that_died_on_its_way_is_completed(mlflow_sqlite: str, experiment: str, plan: Plan, store: Store) -> None:
    """All of a round arrived but not the mark that says so: the next sync sends it again, and no point is there twice."""
    make_round(plan, store, 1)
    sync(plan.run_uri, store=store, tracker=open_tracker(mlflow_sqlite, experiment))
    (parent,), (nested,) = runs(mlflow_sqlite, experiment)
    points = series(mlflow_sqlite, nested), series(mlflow_sqlite, parent)
    client(mlflow_sqlite).delete_tag(parent.info.run_id, "camopd.logged.round-0001")

    again = sync(plan.run_uri, store=store, tracker=open_tracker(mlflow_sqlite, experiment))
    assert again.sent == ("round-0001",)
    (parent,), (nested,) = runs(mlflow_sqlite, experiment)
    assert (series(mlflow_sqlite, nested), series(mlflow_sqlite, parent)) == points


@pytest.mark.slow
def test_a_setting_that_changed_does_not_fail(mlflow_sqlite: str, experiment: str, plan: Plan, store: Store) -> None:
    tracker = open_tracker(mlflow_sqlite, experiment)
    sync(plan.run_uri, store=store, tracker=tracker)
    for rounds in (3, 2):
        changed = plan.recipe.model_copy(update={"num_rounds": rounds})
        store.write(join(plan.run_uri, "recipe.json"), changed.model_dump_json().encode())
        assert sync(plan.run_uri, store=store, tracker=tracker) == SyncResult(sent=("settings",))
        (parent,), _ = runs(mlflow_sqlite, experiment)
        assert parent.data.params["num_rounds"] == "2"
        assert parent.data.tags["camopd.now.num_rounds"] == str(rounds)


@pytest.mark.slow
def test_the_same_recovery_elsewhere_is_another_run(mlflow_sqlite: str, experiment: str, tmp_path: Path, store: Store) -> None:
    for folder in ("here", "there"):
        plan = make_plan(str(tmp_path / folder), store)
        sync(plan.run_uri, store=store, tracker=open_tracker(mlflow_sqlite, experiment))
    parents, _ = runs(mlflow_sqlite, experiment)
    assert {run.data.tags["camopd.run_uri"] for run in parents} == {
        str(tmp_path / folder / Path(plan.run_uri).name) for folder in ("here", "there")
    }


@pytest.mark.slow
def test_an_injected_run_is_the_parent(
    mlflow_sqlite: str, experiment: str, plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubeflow's plugin gives each task a nested run; the rounds go below the pipeline's, whose end is not ours to tell."""
    make_round(plan, store, 1)
    make_round(plan, store, 2)
    make_evaluation(plan, store)
    mlflow = client(mlflow_sqlite)
    where = mlflow.create_experiment(experiment)
    pipeline = mlflow.create_run(where, run_name="pipeline").info.run_id
    for name in ("train", "evaluate"):
        task = mlflow.create_run(where, run_name=name, tags={"mlflow.parentRunId": pipeline})
        monkeypatch.setenv("MLFLOW_RUN_ID", task.info.run_id)
        result = sync(plan.run_uri, store=store, tracker=open_tracker(mlflow_sqlite, "another"))
        assert result.problem == ""
    (parent,), nested = runs(mlflow_sqlite, experiment)
    assert parent.info.run_id == pipeline
    assert parent.info.status == "RUNNING"
    assert sorted(run.info.run_name for run in nested) == ["evaluate", "round-0001", "round-0002", "train"]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {pipeline}
    assert mlflow.get_experiment_by_name("another") is None


@pytest.mark.slow
def test_many_steps_go_in_bounded_requests(mlflow_proxy: Proxy, experiment: str, plan: Plan, store: Store) -> None:
    steps = [{"step": i, "loss": i / 7, "branches": {"general": {"gap": 1.0, "tokens": i}}} for i in range(500)]
    make_round(plan, store, 1, steps=steps)
    assert not sync(plan.run_uri, store=store, tracker=open_tracker(mlflow_proxy.uri, experiment)).problem
    _, (nested,) = runs(mlflow_proxy.uri, experiment)
    assert len(series(mlflow_proxy.uri, nested)["general/gap"]) == 500
    assert 4 <= sum("log-batch" in request for request in mlflow_proxy.requests) <= 12


# --- Trouble --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_an_outage_missed_is_sent_later(
    mlflow_proxy: Proxy,
    experiment: str,
    plan: Plan,
    store: Store,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a user's own wish
    tracker = open_tracker(mlflow_proxy.uri, experiment)
    sync(plan.run_uri, store=store, tracker=tracker)
    mlflow_proxy.mode = "down"  # and asks for twenty minutes of patience
    for number in (1, 2):
        make_round(plan, store, number)
        begun = time.monotonic()
        with caplog.at_level(logging.WARNING, "camopd"):
            result = sync(plan.run_uri, store=store, tracker=tracker)
        assert time.monotonic() - begun < 10
        assert result.sent == ()
        assert mlflow_proxy.uri in result.problem
    warnings = [record for record in caplog.records if record.name.startswith("camopd")]
    assert len(warnings) == 2
    assert warnings[0].getMessage().startswith("MLflow lacks a part of this run, which the next sync sends: ")
    mlflow_proxy.mode = "up"
    assert sync(plan.run_uri, store=store, tracker=tracker).sent == ("round-0001", "round-0002")
    (parent,), _ = runs(mlflow_proxy.uri, experiment)
    assert series(mlflow_proxy.uri, parent)["train/general/loss"] == [(1, 0.75), (2, 0.75)]


@pytest.mark.slow
def test_silence_ends_with_the_time_out(
    mlflow_proxy: Proxy, experiment: str, plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    mlflow_proxy.mode = "mute"
    begun = time.monotonic()
    assert mlflow_proxy.uri in sync(plan.run_uri, store=store, tracker=open_tracker(mlflow_proxy.uri, experiment)).problem
    assert time.monotonic() - begun < 10


@pytest.mark.slow
@pytest.mark.parametrize("where", ["runs/create", "log-batch", "runs/update", "experiments/create"])
def test_an_answer_that_got_lost_leaves_nothing_twice(
    where: str, mlflow_proxy: Proxy, experiment: str, plan: Plan, store: Store
) -> None:
    make_round(plan, store, 1)
    tracker = open_tracker(mlflow_proxy.uri, experiment)
    mlflow_proxy.mode, mlflow_proxy.where = "forgetful", where
    assert mlflow_proxy.uri in sync(plan.run_uri, store=store, tracker=tracker).problem
    mlflow_proxy.mode = "up"
    assert not sync(plan.run_uri, store=store, tracker=tracker).problem
    (_,), (nested,) = runs(mlflow_proxy.uri, experiment)
    assert series(mlflow_proxy.uri, nested)["general/gap"] == [(0, 0.5)]


@pytest.mark.slow
def test_nobody_listens(plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")  # nothing is ever started on port 9
    problem = sync(plan.run_uri, store=store, tracker=tracker_for(Tracking())).problem
    assert "***@127.0.0.1:9" in problem
    assert "secret" not in problem


@pytest.mark.slow
def test_a_broken_store_is_not_an_outage(mlflow_sqlite: str, experiment: str, plan: Plan, store: Store) -> None:
    make_round(plan, store, 1)
    Path(plan.rounds[0], "train", "steps.json").unlink()
    with pytest.raises(StoreError, match=r"steps\.json"):
        sync(plan.run_uri, store=store, tracker=open_tracker(mlflow_sqlite, experiment))


@pytest.mark.slow
def test_a_slow_server_gets_the_rest_later(mlflow_sqlite: str, experiment: str, tmp_path: Path, store: Store) -> None:
    plan = make_run(str(tmp_path / "runs"), store)
    tracker = open_tracker(mlflow_sqlite, experiment)
    result = sync(plan.run_uri, store=store, tracker=tracker, seconds=0)
    assert result.sent == ()
    assert "is slow" in result.problem
    assert len(sync(plan.run_uri, store=store, tracker=tracker).sent) == 6


@pytest.mark.slow
def test_snapshot_is_taken_once(mlflow_proxy: Proxy, tmp_path: Path, store: Store) -> None:
    name, experiment = f"model-{uuid4().hex}", "snapshots"
    tracker = open_tracker(mlflow_proxy.uri, experiment)
    plans = [make_plan(str(tmp_path / str(i)), store, promote={"model_name": name}) for i in range(3)]
    alias_snapshot(plans[0].run_uri, store=store, tracker=tracker)
    mlflow = client(mlflow_proxy.uri)
    mlflow.create_registered_model(name)
    mlflow.create_model_version(name, "s3://bucket/elsewhere", await_creation_for=0)
    mlflow.set_registered_model_alias(name, "champion", "1")
    for plan in plans[:2]:
        alias_snapshot(plan.run_uri, store=store, tracker=tracker)
    mlflow_proxy.mode = "down"
    alias_snapshot(plans[2].run_uri, store=store, tracker=tracker)
    mlflow_proxy.mode = "up"
    alias_snapshot(plans[2].run_uri, store=store, tracker=tracker)  # it was down when the run started: that stays unknown
    known = [alias_at_start(plan, store) for plan in plans]
    assert known == [
        tracking.AliasAtStart(known=True, version=None),
        tracking.AliasAtStart(known=True, version=1),
        tracking.AliasAtStart(known=False, version=None),
    ]


@pytest.mark.slow
def test_sync_is_quick(mlflow_sqlite: str, experiment: str, plan: Plan, store: Store) -> None:
    tracker = open_tracker(mlflow_sqlite, experiment)
    sync(plan.run_uri, store=store, tracker=tracker)
    make_round(plan, store, 1)
    begun = time.monotonic()
    sync(plan.run_uri, store=store, tracker=tracker)
    assert time.monotonic() - begun < 3  # 0.2 s on an idle machine
