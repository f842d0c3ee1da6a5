"""Evaluated runs that are ready to be promoted, and MLflow's own client to look at what became of them."""

from __future__ import annotations

from typing import Any

from camopd.config import Tracking
from camopd.plan import Plan
from camopd.store import Store
from camopd.tracking import Tracker, alias_snapshot, tracker_for
from tests.finished import make_evaluation, make_plan, make_round


def open_tracker(uri: str) -> Tracker:
    return tracker_for(Tracking(uri=uri, experiment="promotions"))


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def versions(uri: str, model: str) -> list[Any]:
    return sorted(client(uri).search_model_versions(f"name = '{model}'"), key=lambda version: int(version.version))


def aliases(uri: str, model: str) -> dict[str, int]:
    return {name: int(version) for name, version in client(uri).get_registered_model(model).aliases.items()}


def statuses(uri: str, model: str) -> dict[int, str]:
    return {int(version.version): version.tags.get("camopd.status", "") for version in versions(uri, model)}


def make_ready(
    output: str, store: Store, tracker: Tracker, model: str, *, seed: int = 0, passed: bool = True, **promote: Any
) -> Plan:
    """A run that was started with tracking and is evaluated now."""
    plan = make_plan(output, store, seed=seed, promote={"model_name": model, **promote})
    alias_snapshot(plan.run_uri, store=store, tracker=tracker)
    for number in (1, 2):
        make_round(plan, store, number)
    make_evaluation(plan, store, passed=passed)
    return plan
