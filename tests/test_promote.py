"""Promotion: one version, an alias that moves only from where it was, and never at the cost of someone else's."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from uuid import uuid4

import pytest

from camopd import promote
from camopd.errors import StoreError, TrackingError
from camopd.export import export_uri
from camopd.plan import Plan, checkpoint_uri
from camopd.promote import Release, obstacle, release_uri
from camopd.store import Store, join
from camopd.tracking import AliasAtStart, NullTracker, Tracker, Version, alias_snapshot, sync
from tests.finished import make_evaluation, make_plan, make_round, make_run
from tests.fixtures.mlflow_server import Proxy
from tests.registered import aliases, client, make_ready, open_tracker, versions


@pytest.fixture(autouse=True)
def _no_tracking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"mlflow_{request.param}")


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def model() -> str:
    return f"model-{uuid4().hex}"


@pytest.fixture
def ready(tmp_path: Path, store: Store, model: str) -> Callable[..., Plan]:
    """Make a run that was started with tracking and is evaluated now."""

    def make(tracker: Tracker, *, seed: int = 0, passed: bool = True, **promote: Any) -> Plan:
        return make_ready(str(tmp_path / "runs"), store, tracker, model, seed=seed, passed=passed, **promote)

    return make


def exported(plan: Plan, store: Store) -> str:
    return export_uri(release_uri(plan, store))


def written(plan: Plan, store: Store) -> dict[str, Any]:
    return json.loads(store.read(join(release_uri(plan, store), "release.json")))


# --- Without a registry ---------------------------------------------------------------------------------------------------


def test_disabled_without_a_registry(tmp_path: Path, store: Store) -> None:
    plan = make_run(str(tmp_path), store)
    release = promote.run(plan.run_uri, store=store, tracker=NullTracker())
    assert (release.status, release.version) == ("disabled", None)
    assert "MLFLOW_TRACKING_URI" in release.reasons[0]
    assert release.checkpoint_uri == str(tmp_path / Path(plan.run_uri).name / "rounds" / "0002" / "train")
    assert written(plan, store)["status"] == "disabled"


def test_refused_by_the_gate(tmp_path: Path, store: Store) -> None:
    plan = make_run(str(tmp_path), store, passed=False)
    release = promote.run(plan.run_uri, store=store, tracker=NullTracker())
    assert release.status == "refused"
    assert release.reasons == ("the gate said no", "domain retained 0.80, below 0.95")
    assert written(plan, store)["reasons"] == list(release.reasons)


def test_refused_when_switched_off(tmp_path: Path, store: Store) -> None:
    plan = make_run(str(tmp_path), store, promote={"policy": "never"})
    assert promote.run(plan.run_uri, store=store, tracker=NullTracker()).status == "refused"


def test_not_evaluated(tmp_path: Path, store: Store) -> None:
    plan = make_plan(str(tmp_path), store, num_rounds=1)
    make_round(plan, store, 1)
    with pytest.raises(StoreError, match="evaluation"):
        promote.run(plan.run_uri, store=store, tracker=NullTracker())


# --- Who may move the alias -----------------------------------------------------------------------------------------------


def version(number: int, run: str = "ours", **tags: str) -> Version:
    return Version(number, {"camopd.run_id": run, "camopd.alias": "champion", **tags})


@pytest.mark.parametrize(
    ("start", "current", "free"),
    [
        (None, None, True),
        (2, 2, True),
        (None, 5, True),  # moved by us, and then we were killed
        (2, 3, False),  # somebody else's
        (2, None, False),  # taken away
        (None, 2, False),
        (None, 1, True),  # our own of fewer rounds
    ],
)
def test_the_alias_moves_only_from_where_it_was(start: int | None, current: int | None, free: bool) -> None:
    known = [version(1), version(2, "other"), version(3, "other"), version(5)]
    reason = obstacle(known[-1], known, AliasAtStart(True, start), current)
    assert (reason == "") is free


@pytest.mark.parametrize("status", ["rejected", "rolled-back"])
def test_what_a_person_has_decided_stands(status: str) -> None:
    decided = version(5, **{"camopd.status": status})
    assert obstacle(version(5), [decided], AliasAtStart(True, None), None) == f"version 5 was {status} meanwhile"
    assert "deleted" in obstacle(version(5), [version(4)], AliasAtStart(True, None), None)


# --- Against MLflow -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_promoted_once(uri: str, model: str, ready: Callable[..., Plan], store: Store) -> None:
    tracker = open_tracker(uri)
    plan = ready(tracker)
    release = promote.run(plan.run_uri, store=store, tracker=tracker)
    assert (release.status, release.version, release.reasons) == ("promoted", 1, ())
    assert aliases(uri, model) == {"champion": 1}
    (made,) = versions(uri, model)
    assert made.tags["camopd.content_id"] == store.require(checkpoint_uri(plan.rounds[-1])).content_id
    assert made.tags["camopd.content_id.student"] == plan.content_ids["student"]
    assert made.tags["camopd.checkpoint_uri"] == exported(plan, store)
    assert made.tags["camopd.score.recovered_general_low"] == "0.55"
    assert client(uri).get_run(made.run_id).data.tags["camopd.run_id"] == made.tags["camopd.run_id"]

    again = promote.run(plan.run_uri, store=store, tracker=open_tracker(uri))
    assert (again.status, again.version) == ("already-promoted", 1)
    assert written(plan, store)["status"] == "promoted"
    assert len(versions(uri, model)) == 1

    sync(plan.run_uri, store=store, tracker=tracker)
    assert client(uri).get_run(made.run_id).data.tags["camopd.release.version"] == "1"


@pytest.mark.slow
def test_the_source_is_the_export(mlflow_sqlite: str, model: str, ready: Callable[..., Plan], store: Store) -> None:
    from mlflow.artifacts import download_artifacts

    tracker = open_tracker(mlflow_sqlite)
    plan = ready(tracker)
    promote.run(plan.run_uri, store=store, tracker=tracker)
    (made,) = versions(mlflow_sqlite, model)
    place = exported(plan, store)
    assert made.source == Path(place).as_uri()
    assert Path(download_artifacts(made.source), "model.safetensors").read_text() == "weights 0 2"
    shutil.rmtree(checkpoint_uri(plan.rounds[-1]))  # nobody needs it any more
    assert store.verify(place, deep=True) == []


@pytest.mark.slow
def test_a_server_gets_a_pointer_to_a_folder(mlflow_server: str, model: str, ready: Callable[..., Plan], store: Store) -> None:
    tracker = open_tracker(mlflow_server)
    plan = ready(tracker)
    promote.run(plan.run_uri, store=store, tracker=tracker)
    (made,) = versions(mlflow_server, model)
    assert made.source == f"runs:/{made.run_id}/checkpoint"
    file = client(mlflow_server).download_artifacts(made.run_id, "checkpoint/checkpoint.json")
    pointer = json.loads(Path(file).read_text())
    assert pointer["camopd.checkpoint_uri"] == exported(plan, store)


@pytest.mark.slow
def test_weights_in_an_object_store(uri: str, model: str, s3_prefix: str, store: Store) -> None:
    tracker = open_tracker(uri)
    plan = make_plan(s3_prefix, store, promote={"model_name": model})
    alias_snapshot(plan.run_uri, store=store, tracker=tracker)
    for number in (1, 2):
        make_round(plan, store, number)
    make_evaluation(plan, store)
    assert sync(plan.run_uri, store=store, tracker=tracker).problem == ""
    assert promote.run(plan.run_uri, store=store, tracker=tracker).status == "promoted"
    assert aliases(uri, model) == {"champion": 1}
    (made,) = versions(uri, model)
    assert made.source == exported(plan, store)
    assert made.source.startswith("s3://")


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_damaged_weights_make_no_version(
    harm: str, mlflow_sqlite: str, model: str, ready: Callable[..., Plan], store: Store
) -> None:
    tracker = open_tracker(mlflow_sqlite)
    plan = ready(tracker)
    weights = Path(checkpoint_uri(plan.rounds[-1]), "model.safetensors")
    whole = weights.read_bytes()
    if harm == "missing":
        weights.unlink()
    else:
        weights.write_bytes(whole[::-1])
    release = promote.run(plan.run_uri, store=store, tracker=tracker)
    assert release.status == "refused"
    assert "model.safetensors" in release.reasons[0]
    assert versions(mlflow_sqlite, model) == []
    weights.write_bytes(whole)
    assert promote.run(plan.run_uri, store=store, tracker=tracker).status == "promoted"


@pytest.mark.slow
def test_somebody_else_was_faster(uri: str, model: str, ready: Callable[..., Plan], store: Store) -> None:
    tracker = open_tracker(uri)
    plan = ready(tracker)
    mlflow = client(uri)
    mlflow.create_registered_model(model)
    mlflow.create_model_version(model, "s3://bucket/other", await_creation_for=0)
    mlflow.set_registered_model_alias(model, "champion", "1")
    for _ in range(2):
        release = promote.run(plan.run_uri, store=store, tracker=tracker)
        assert (release.status, release.version) == ("superseded", 2)
        assert "points to version 1 now, and to nothing when the run started" in release.reasons[0]
    assert aliases(uri, model) == {"champion": 1}
    mlflow.delete_registered_model_alias(model, "champion")  # now it is again as it was
    assert promote.run(plan.run_uri, store=store, tracker=tracker).status == "promoted"
    assert aliases(uri, model) == {"champion": 2}
    assert len(versions(uri, model)) == 2


@pytest.mark.slow
def test_a_roll_back_by_hand_stays(mlflow_sqlite: str, model: str, ready: Callable[..., Plan], store: Store) -> None:
    tracker = open_tracker(mlflow_sqlite)
    for seed in (0, 1):
        plan = ready(tracker, seed=seed)
        assert promote.run(plan.run_uri, store=store, tracker=tracker).status == "promoted"
    client(mlflow_sqlite).set_registered_model_alias(model, "champion", "1")
    assert promote.run(plan.run_uri, store=store, tracker=tracker).status == "already-promoted"
    assert aliases(mlflow_sqlite, model) == {"champion": 1}


@pytest.mark.slow
def test_more_rounds_move_the_alias_on(mlflow_sqlite: str, model: str, ready: Callable[..., Plan], store: Store) -> None:
    """The snapshot is of the first start; the alias has moved since, but to this run's own earlier version."""
    tracker = open_tracker(mlflow_sqlite)
    plan = ready(tracker)
    promote.run(plan.run_uri, store=store, tracker=tracker)
    longer = plan.recipe.model_copy(update={"num_rounds": 3})
    store.write(join(plan.run_uri, "recipe.json"), longer.model_dump_json().encode())
    plan = Plan.load(store, plan.run_uri)
    make_round(plan, store, 3)
    make_evaluation(plan, store)
    assert promote.run(plan.run_uri, store=store, tracker=tracker).status == "promoted"
    assert aliases(mlflow_sqlite, model) == {"champion": 2}


@pytest.mark.slow
def test_nobody_knows_where_the_alias_was(mlflow_sqlite: str, model: str, tmp_path: Path, store: Store) -> None:
    plan = make_run(str(tmp_path / "runs"), store, promote={"model_name": model})  # no snapshot: MLflow came later
    release = promote.run(plan.run_uri, store=store, tracker=open_tracker(mlflow_sqlite))
    assert (release.status, release.version) == ("alias-unverified", 1)
    assert aliases(mlflow_sqlite, model) == {}


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(3))
def test_of_several_at_once_one_wins(
    repetition: int, mlflow_server: str, model: str, ready: Callable[..., Plan], store: Store
) -> None:
    plans = [ready(open_tracker(mlflow_server), seed=seed) for seed in range(4)]
    start = Barrier(len(plans))

    def race(plan: Plan) -> Release:
        tracker = open_tracker(mlflow_server)
        start.wait()
        return promote.run(plan.run_uri, store=store, tracker=tracker)

    with ThreadPoolExecutor(len(plans)) as pool:
        releases = list(pool.map(race, plans))
    assert sorted(release.status for release in releases) == ["promoted", *["superseded"] * 3]
    winner = next(release for release in releases if release.status == "promoted")
    assert aliases(mlflow_server, model) == {"champion": winner.version}
    assert len(versions(mlflow_server, model)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(3))
def test_one_run_promoted_twice_at_once(
    repetition: int, mlflow_server: str, model: str, ready: Callable[..., Plan], store: Store
) -> None:
    plan = ready(open_tracker(mlflow_server))
    start = Barrier(3)

    def race(_: int) -> Release:
        tracker = open_tracker(mlflow_server)
        start.wait()
        return promote.run(plan.run_uri, store=store, tracker=tracker)

    with ThreadPoolExecutor(3) as pool:
        releases = list(pool.map(race, range(3)))
    (only,) = versions(mlflow_server, model)
    assert {release.version for release in releases} == {int(only.version)}
    assert {release.status for release in releases} <= {"promoted", "already-promoted"}
    assert aliases(mlflow_server, model) == {"champion": int(only.version)}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["registered-models/create", "model-versions/create", "registered-models/alias", "set-tag"])
def test_an_answer_that_got_lost(where: str, mlflow_proxy: Proxy, model: str, ready: Callable[..., Plan], store: Store) -> None:
    tracker = open_tracker(mlflow_proxy.uri)
    plan = ready(tracker)
    mlflow_proxy.mode, mlflow_proxy.where = "forgetful", where
    with pytest.raises(TrackingError):
        promote.run(plan.run_uri, store=store, tracker=tracker, seconds=0)
    mlflow_proxy.mode = "up"
    # The request was honoured, so that the tag that says promoted may be there.
    assert promote.run(plan.run_uri, store=store, tracker=tracker).status in ("promoted", "already-promoted")
    assert len(versions(mlflow_proxy.uri, model)) == 1
    assert aliases(mlflow_proxy.uri, model) == {"champion": 1}


@pytest.mark.slow
def test_a_server_that_comes_back_in_time(mlflow_proxy: Proxy, model: str, ready: Callable[..., Plan], store: Store) -> None:
    tracker = open_tracker(mlflow_proxy.uri)
    plan = ready(tracker)
    mlflow_proxy.mode = "down"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(promote.run, plan.run_uri, store=store, tracker=tracker, seconds=20)
        time.sleep(3)
        mlflow_proxy.mode = "up"
        assert waiting.result().status == "promoted"


@pytest.mark.slow
def test_a_server_that_stays_away(mlflow_proxy: Proxy, ready: Callable[..., Plan], store: Store) -> None:
    tracker = open_tracker(mlflow_proxy.uri)
    plan = ready(tracker)
    mlflow_proxy.mode = "down"
    begun = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        promote.run(plan.run_uri, store=store, tracker=tracker, seconds=2)
    assert 1.5 < time.monotonic() - begun < 10
    assert mlflow_proxy.uri in str(caught.value)
    assert f"The weights are safe at {checkpoint_uri(plan.rounds[-1])}" in str(caught.value)
    assert os.linesep not in str(caught.value)
