"""Case 09: a retried attempt, bad values, a server that goes away, names that the registry refuses.

The case's outage of twenty minutes is a proxy before the real server; nothing in the code depends on how long it lasts.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import TypeAdapter, ValidationError

from camopd import promote
from camopd.config import Promote, Tracking
from camopd.errors import TrackingError
from camopd.plan import checkpoint_uri
from camopd.store import Store, digest
from camopd.tracking import Tracker, alias_snapshot, sync, tracker_for
from camopd.tracking.logbook import Entry, Facts, Identity, params_of, step_points
from tests.finished import STEPS, make_evaluation, make_plan, make_round
from tests.fixtures.mlflow_server import Proxy

CASE = Path(__file__).parent / "cases" / "09-mlflow-retry-and-bad-values"


@pytest.fixture(autouse=True)
def _no_tracking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def open_tracker(uri: str, experiment: str) -> Tracker:
    return tracker_for(Tracking(uri=uri, experiment=experiment))


def attempt(name: str) -> Entry:
    """An attempt's parameters and metrics, by the same rules as a run's."""
    case = json.loads((CASE / f"{name}.json").read_text())
    params, files = params_of(case["params"])
    steps: dict[int, dict[str, Any]] = {}
    for metric in case["metrics"]:
        steps.setdefault(metric["step"], {"step": metric["step"]})[metric["key"]] = metric["value"]
    points, nonfinite_steps, names = step_points(steps.values(), time_ms=1)
    facts = Facts(params, {"nonfinite": f"{nonfinite_steps}: {', '.join(names)}"}, tuple(points), files=files)
    return Entry(name, digest(case), lambda: facts)


@pytest.mark.slow
def test_a_retried_pod_goes_on_in_the_same_run(mlflow_sqlite: str) -> None:
    from mlflow import MlflowClient

    identity = Identity("case-09", "s3://bucket/case-09", {"camopd.run_id": "case-09", "camopd.run_uri": "s3://bucket/case-09"})
    for name in ("attempt1", "attempt2_after_pod_retry", "attempt2_after_pod_retry"):
        run = open_tracker(mlflow_sqlite, "case").open(identity)
        assert run is not None
        run.send(attempt(name))

    client = MlflowClient(mlflow_sqlite)
    (only,) = client.search_runs([client.get_experiment_by_name("case").experiment_id])
    assert only.data.params["lr"] == "1e-06"
    assert only.data.params["teachers"] == "s3://t/a,s3://t/b"
    assert only.data.params["resumed_from"] == "step-40"
    loss = {(point.step, point.value) for point in client.get_metric_history(only.info.run_id, "loss")}
    assert loss == {(1, 2.1), (41, 1.9)}
    assert len(client.get_metric_history(only.info.run_id, "loss")) == 2
    assert only.data.metrics["acc_pct"] == 40.0
    assert "kl" not in only.data.metrics
    assert not any(name.startswith("camopd.now.") for name in only.data.tags)  # 1e-6 and 1e-06 are one value
    # Sent whole by the first attempt, cut by none:
    notes = json.loads((CASE / "attempt1.json").read_text())["params"]["notes"]
    assert len(notes) > 6000
    assert len(only.data.params["notes"]) < 6000
    assert Path(client.download_artifacts(only.info.run_id, "params/notes.txt")).read_text() == notes


def test_what_is_not_finite_is_counted() -> None:
    facts = attempt("attempt1").facts()
    assert facts.tags["nonfinite"] == "2: kl"
    assert {point.name for point in facts.points} == {"loss", "acc_pct"}


@pytest.mark.slow
def test_server_events(mlflow_proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Up, then 503 for twenty minutes, up again, then 403 Invalid Host header."""
    events = json.loads((CASE / "server_events.json").read_text())
    assert [event["server"] for event in events] == ["up", "503 for 20 min", "up", "403 Invalid Host header"]
    store, name = Store(), f"model-{uuid4().hex}"
    tracker = open_tracker(mlflow_proxy.uri, name)
    plan = make_plan(str(tmp_path / "runs"), store, promote={"model_name": name})
    alias_snapshot(plan.run_uri, store=store, tracker=tracker)
    assert sync(plan.run_uri, store=store, tracker=tracker).sent == ("settings", "plan")

    mlflow_proxy.mode = "down"
    make_round(plan, store, 1, steps=[{**STEPS[0], "kl": "Infinity"}, STEPS[1]])
    assert sync(plan.run_uri, store=store, tracker=tracker).sent == ()  # training goes on: nothing was raised

    mlflow_proxy.mode = "up"
    assert sync(plan.run_uri, store=store, tracker=tracker).sent == ("round-0001",)

    mlflow_proxy.mode = "stranger"
    host = mlflow_proxy.uri.removeprefix("http://")
    make_round(plan, store, 2)
    make_evaluation(plan, store)
    with caplog.at_level(logging.WARNING, "camopd"):
        assert f"--allowed-hosts {host}" in sync(plan.run_uri, store=store, tracker=tracker).problem
    assert f"--allowed-hosts {host}" in caplog.text
    with pytest.raises(TrackingError) as caught:  # at once: waiting does not mend it
        promote.run(plan.run_uri, store=store, tracker=tracker)
    assert f"--allowed-hosts {host}" in str(caught.value)
    assert mlflow_proxy.uri in str(caught.value)
    assert f"The weights are safe at {checkpoint_uri(plan.rounds[-1])}" in str(caught.value)

    mlflow_proxy.mode = "up"
    assert promote.run(plan.run_uri, store=store, tracker=tracker).status == "promoted"
    assert len(sync(plan.run_uri, store=store, tracker=tracker).sent) == 4  # round, evaluation, ledger, release


@pytest.mark.slow
def test_names_are_refused_before_mlflow_would(mlflow_sqlite: str) -> None:
    """Every name that passes the recipe's check passes MLflow's, and what MLflow refuses never gets that far."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(mlflow_sqlite)
    settings = TypeAdapter(Promote)
    verdicts: dict[str, bool] = {}
    for name in (CASE / "registry_names.txt").read_text().splitlines():
        try:
            settings.validate_python({"model_name": name})
        except ValidationError:
            verdicts[name] = False
            continue
        client.create_registered_model(name)
        verdicts[name] = True
    assert [name[:10] for name, fine in verdicts.items() if fine] == ["domain-a", "näme"]

    client.create_model_version("domain-a", "s3://bucket/weights", await_creation_for=0)
    taken = []
    for alias in (CASE / "aliases.txt").read_text().splitlines():
        try:
            settings.validate_python({"alias": alias})
        except ValidationError:
            if alias not in ("", "Latest"):  # MLflow takes an empty alias
                with pytest.raises(MlflowException):
                    client.set_registered_model_alias("domain-a", alias, "1")
            continue
        client.set_registered_model_alias("domain-a", alias, "1")
        taken.append(alias)
    assert taken == ["champion", "candidate"]
