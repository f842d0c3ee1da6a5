"""Approve, reject, roll back: against a real MLflow server, by the package and the command line, alone and at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any
from uuid import uuid4

import pytest

from camopd import promote
from camopd.approval import Decision, approve, history, reject, rollback
from camopd.errors import RefusedError, TrackingError
from camopd.history import Actor
from camopd.plan import Plan, checkpoint_uri
from camopd.store import Store
from camopd.tracking import Registry
from tests.finished import make_plan
from tests.fixtures.mlflow_server import Proxy
from tests.fixtures.webhook import Webhook
from tests.registered import aliases, client, make_ready, open_tracker, statuses, versions

pytestmark = pytest.mark.slow
ANA = Actor("Ana Lima", "read 50 answers", "alima")
BEN = Actor("Ben", "complaints since Monday", "ben")


@pytest.fixture(autouse=True)
def _no_tracking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "CAMOPD_USER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def model() -> str:
    return f"model-{uuid4().hex}"


@pytest.fixture
def open_registry(mlflow_server: str, model: str) -> Callable[[], Registry]:
    """The model, by a client of its own at each call."""

    def make() -> Registry:
        registry = open_tracker(mlflow_server).registry(model)
        assert registry is not None
        return registry

    return make


@pytest.fixture
def registry(open_registry: Callable[[], Registry]) -> Registry:
    return open_registry()


@pytest.fixture
def finish(tmp_path: Path, store: Store, mlflow_server: str, model: str) -> Callable[..., Plan]:
    """A run that has promoted, by the policy that is asked for."""

    def make(seed: int, policy: str = "manual", **promote_: Any) -> Plan:
        tracker = open_tracker(mlflow_server)
        plan = make_ready(str(tmp_path / "runs"), store, tracker, model, seed=seed, policy=policy, **promote_)
        promote.run(plan.run_uri, store=store, tracker=tracker)
        return plan

    return make


def weights(uri: str, model: str, number: int) -> Path:
    tags = client(uri).get_model_version(model, str(number)).tags
    return Path(tags["camopd.checkpoint_uri"], "model.safetensors")


def told(model: str, registry: Registry) -> list[tuple[str, int, str]]:
    return [(line.event.what, line.event.version, line.event.by) for line in history(model, registry)]


# --- Policy manual --------------------------------------------------------------------------------------------------------


def test_a_passed_model_waits_and_is_approved_by_a_person(mlflow_server, model, registry, finish, store) -> None:
    plan = finish(0)
    assert (aliases(mlflow_server, model), statuses(mlflow_server, model)) == ({"candidate": 1}, {1: "candidate"})
    release = promote.run(plan.run_uri, store=store, tracker=open_tracker(mlflow_server))
    assert (release.status, release.version, release.alias) == ("candidate", 1, "candidate")

    done = approve(model, registry, store, ANA)
    assert (done.alias, done.before, done.now) == ("champion", None, 1)
    assert (aliases(mlflow_server, model), statuses(mlflow_server, model)) == ({"champion": 1}, {1: "promoted"})
    (made,) = versions(mlflow_server, model)
    assert (made.tags["camopd.decided_by"], made.tags["camopd.decided_why"]) == ("Ana Lima", "read 50 answers")
    release = promote.run(plan.run_uri, store=store, tracker=open_tracker(mlflow_server))
    assert (release.status, release.alias) == ("already-promoted", "champion")
    first, second = history(model, registry)
    assert (first.event.what, second.event.what) == ("candidate", "approved")
    assert (second.event.by, second.event.login, second.event.before, second.event.after) == ("Ana Lima", "alima", None, 1)
    assert second.scores == {"recovered_general": (0.61, 0.55, 0.70)}
    assert second.report.endswith("report.html")
    with pytest.raises(RefusedError, match=r"has no candidate \(version 1, the latest, is promoted"):
        approve(model, registry, store, ANA)


def test_a_newer_candidate_takes_the_place_and_the_older_may_still_be_approved(
    mlflow_server, model, registry, finish, store
) -> None:
    first = finish(0)
    finish(1)
    assert aliases(mlflow_server, model) == {"candidate": 2}
    assert statuses(mlflow_server, model) == {1: "superseded-candidate", 2: "candidate"}
    again = promote.run(first.run_uri, store=store, tracker=open_tracker(mlflow_server))
    assert again.status == "superseded-candidate"
    assert [(what, number) for what, number, _ in told(model, registry)] == [
        ("candidate", 1),
        ("candidate", 2),
        ("superseded", 1),
    ]
    assert approve(model, registry, store, ANA, version=1).now == 1
    assert aliases(mlflow_server, model) == {"champion": 1, "candidate": 2}


def test_of_candidates_that_finish_at_once_the_newest_waits(mlflow_server, model, finish) -> None:
    start = Barrier(3)

    def race(seed: int) -> None:
        start.wait()
        finish(seed)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(race, range(3)))
    assert aliases(mlflow_server, model) == {"candidate": 3}
    assert statuses(mlflow_server, model) == {1: "superseded-candidate", 2: "superseded-candidate", 3: "candidate"}


def test_a_rejected_version_stays_rejected(mlflow_server, model, registry, finish, store) -> None:
    plan = finish(0)
    assert reject(model, registry, BEN).version.number == 1
    assert (aliases(mlflow_server, model), statuses(mlflow_server, model)) == ({}, {1: "rejected"})
    release = promote.run(plan.run_uri, store=store, tracker=open_tracker(mlflow_server))
    assert (release.status, release.reasons) == ("rejected", ("rejected by Ben: complaints since Monday",))
    with pytest.raises(RefusedError, match=r"was rejected by Ben \(complaints since Monday\); --again"):
        approve(model, registry, store, ANA, version=1)
    with pytest.raises(RefusedError, match="does not wait: it is rejected"):
        reject(model, registry, BEN, version=1)
    assert approve(model, registry, store, ANA, version=1, again=True).now == 1
    assert [what for what, _, _ in told(model, registry)] == ["candidate", "rejected", "approved"]


def test_another_policy_later_decides_about_the_same_version(mlflow_server, model, finish) -> None:
    plan = finish(0)
    make_plan(plan.recipe.output, Store(), promote={"model_name": model, "policy": "auto"})
    release = promote.run(plan.run_uri, store=Store(), tracker=open_tracker(mlflow_server))
    assert (release.status, release.version) == ("promoted", 1)
    assert aliases(mlflow_server, model) == {"champion": 1}


# --- Refusals -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_approved_is_refused_with_a_sentence(mlflow_server, model, registry, finish, store) -> None:
    with pytest.raises(RefusedError, match="no registered model"):
        approve(model, registry, store, ANA)
    finish(0, policy="auto")
    mlflow = client(mlflow_server)
    mlflow.create_model_version(model, "s3://bucket/by-hand", await_creation_for=0)
    with pytest.raises(RefusedError, match="was promoted already; `camopd rollback"):
        approve(model, registry, store, ANA, version=1)
    with pytest.raises(RefusedError, match="not made by a recovery"):
        approve(model, registry, store, ANA, version=2)
    with pytest.raises(RefusedError, match="has no version 9; it has 1, 2"):
        approve(model, registry, store, ANA, version=9)
    with pytest.raises(RefusedError, match="camopd rollback takes the alias"):
        reject(model, registry, ANA, version=1)
    with pytest.raises(RefusedError, match="--why is empty"):
        approve(model, registry, store, Actor("Ana", " "), version=1)
    with pytest.raises(RefusedError, match="2000 are kept"):
        reject(model, registry, Actor("Ana", "x" * 2001), version=1)
    registry.tag(1, {"camopd.status": "pending"})
    with pytest.raises(RefusedError, match="promotion is under way"):
        approve(model, registry, store, ANA, version=1)
    assert aliases(mlflow_server, model) == {"champion": 1}


@pytest.mark.parametrize("harm", ["missing", "changed", "other"])
def test_damaged_weights_are_never_approved(harm, mlflow_server, model, registry, finish, store) -> None:
    finish(0)
    file = weights(mlflow_server, model, 1)
    whole, manifest = file.read_bytes(), file.with_name("manifest.json")
    if harm == "missing":
        file.unlink()
    elif harm == "changed":
        file.write_bytes(whole[::-1])
    else:  # files and manifest agree, and are not what was promoted
        text = manifest.read_text()
        manifest.write_text(text.replace(json.loads(text)["content_id"], "sha256:other"))
    with pytest.raises(RefusedError, match=r"is not approved: .*(model\.safetensors|other weights)"):
        approve(model, registry, store, ANA)
    assert (aliases(mlflow_server, model), statuses(mlflow_server, model)) == ({"candidate": 1}, {1: "candidate"})


# --- Rollback -------------------------------------------------------------------------------------------------------------


def test_back_to_the_version_before_and_no_run_undoes_it(mlflow_server, model, registry, finish, store) -> None:
    first, second = finish(0, "auto"), finish(1, "auto")
    done = rollback(model, registry, store, BEN)
    assert (done.before, done.now) == (2, 1)
    assert "every file" in done.checked
    assert (aliases(mlflow_server, model), statuses(mlflow_server, model)) == (
        {"champion": 1},
        {1: "promoted", 2: "rolled-back"},
    )
    for plan, status in ((second, "rolled-back"), (first, "already-promoted")):
        assert promote.run(plan.run_uri, store=store, tracker=open_tracker(mlflow_server)).status == status
    assert aliases(mlflow_server, model) == {"champion": 1}
    with pytest.raises(RefusedError, match=r"no version held the alias champion .* before version 1"):
        rollback(model, registry, store, BEN)
    with pytest.raises(RefusedError, match=r"version 2 .* is rolled-back"):
        rollback(model, registry, store, BEN, to=2)
    assert approve(model, registry, store, ANA, version=2, again=True).now == 2
    assert [what for what, _, _ in told(model, registry)] == ["promoted", "promoted", "rolled-back", "approved"]
    assert rollback(model, registry, store, BEN).now == 1


def test_the_version_before_is_whose_alias_it_was_and_not_the_number_below(
    mlflow_server, model, registry, finish, store
) -> None:
    finish(0, "auto")
    finish(1)  # waits
    reject(model, registry, BEN)
    finish(2)
    approve(model, registry, store, ANA)
    assert aliases(mlflow_server, model) == {"champion": 3}
    with pytest.raises(RefusedError, match=r"version 2 .* is rejected, so that nothing goes back"):
        rollback(model, registry, store, BEN, to=2)
    assert rollback(model, registry, store, BEN).now == 1


def test_a_damaged_version_is_passed_by_with_the_name_of_a_whole_one(mlflow_server, model, registry, finish, store) -> None:
    for seed in range(4):
        finish(seed, "auto")
    weights(mlflow_server, model, 3).unlink()
    weights(mlflow_server, model, 2).write_bytes(b"weights 9 9")  # as long as before
    with pytest.raises(RefusedError, match=r"version 3 .*model\.safetensors is missing; version 1 is whole: --to 1"):
        rollback(model, registry, store, BEN)
    assert aliases(mlflow_server, model) == {"champion": 4}
    assert rollback(model, registry, store, BEN, to=1).now == 1
    assert statuses(mlflow_server, model)[4] == "rolled-back"


def test_versions_of_the_earlier_layout_roll_back(mlflow_server, model, registry, finish, store) -> None:
    """Their source is the last checkpoint itself, and they have no events."""
    old, mlflow = finish(0, "never"), client(mlflow_server)
    place = checkpoint_uri(old.rounds[-1])
    mlflow.create_registered_model(model)
    tags = {"camopd.run_id": Path(old.run_uri).name, "camopd.run_uri": old.run_uri, "camopd.alias": "champion"}
    tags |= {"camopd.content_id": store.require(place).content_id, "camopd.checkpoint_uri": place, "camopd.status": "promoted"}
    mlflow.create_model_version(model, "s3://bucket/any", tags=tags, await_creation_for=0)
    mlflow.set_registered_model_alias(model, "champion", "1")
    finish(1, "auto")
    assert aliases(mlflow_server, model) == {"champion": 2}
    done = rollback(model, registry, store, BEN)
    assert (done.now, "every file" in done.checked) == (1, True)
    assert told(model, registry)[0] == ("promoted", 1, Path(old.run_uri).name)


def test_the_first_champion_may_be_a_version_that_somebody_registered(model, tmp_path, mlflow_server, finish, store) -> None:
    """It has no manifest: its files are looked for, by MLflow's own means."""
    mlflow = client(mlflow_server)
    run = mlflow.create_run("0")
    mlflow.log_text(run.info.run_id, "weights", "model/model.safetensors")
    mlflow.create_registered_model(model)
    for source in (f"runs:/{run.info.run_id}/model", f"runs:/{run.info.run_id}/gone"):
        mlflow.create_model_version(model, source, run.info.run_id, await_creation_for=0)
    mlflow.set_registered_model_alias(model, "champion", "1")
    finish(0, "auto")
    registry = open_tracker(mlflow_server).registry(model)
    with pytest.raises(RefusedError, match="finds no file at the source of version 2; version 1 is whole"):
        rollback(model, registry, store, BEN, to=2)
    done = rollback(model, registry, store, BEN)
    assert (done.before, done.now, "no recovery made" in done.checked) == (3, 1, True)


def test_what_was_moved_by_hand_is_told(mlflow_server, model, registry, finish, store) -> None:
    for seed in range(2):
        finish(seed, "auto")
    client(mlflow_server).set_registered_model_alias(model, "champion", "1")
    last = history(model, registry)[-1].event
    assert (last.what, last.before, last.after) == ("moved outside", 2, 1)
    with pytest.raises(RefusedError, match="no alias challenger"):
        rollback(model, registry, store, BEN, alias="challenger")


# --- At the same time -----------------------------------------------------------------------------------------------------


def at_once(*acts: Callable[[], Any]) -> list[Any]:
    """What each did, or why it was refused."""
    start = Barrier(len(acts))

    def run(act: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return act()
        except RefusedError as error:
            return str(error)

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(run, acts))


@pytest.mark.parametrize("repetition", range(3))
def test_two_approvals_of_two_versions(repetition, mlflow_server, model, open_registry, finish, store) -> None:
    for seed in range(2):
        finish(seed)
    done = at_once(
        lambda: approve(model, open_registry(), store, ANA, version=1),
        lambda: approve(model, open_registry(), store, BEN, version=2),
    )
    check_one_winner(mlflow_server, model, open_registry(), done, who=("Ana Lima", "Ben"))


def check_one_winner(uri: str, model: str, registry: Registry, done: list[Any], who: tuple[str, ...]) -> None:
    """One moved the alias, it is there, and the other says who did; unless it began when all was over and moved it on."""
    winners = [each for each in done if isinstance(each, Decision)]
    moves = [line.event for line in history(model, registry) if line.event.what in ("approved", "rolled-back", "promoted")]
    assert aliases(uri, model)["champion"] == moves[-1].after
    assert len(winners) in (1, 2)
    for loser in (each for each in done if isinstance(each, str)):
        assert "meanwhile" in loser
        assert any(name in loser for name in who)
    chain = [(move.before, move.after) for move in moves]
    assert all(later[0] == earlier[1] for earlier, later in pairwise(chain)), chain
    assert not any(line.event.what == "moved outside" for line in history(model, registry))


@pytest.mark.parametrize("repetition", range(3))
def test_an_approval_against_a_finishing_run(repetition, tmp_path, mlflow_server, model, open_registry, finish, store) -> None:
    finish(0)
    tracker = open_tracker(mlflow_server)
    plan = make_ready(str(tmp_path / "runs"), store, tracker, model, seed=1)
    approved, release = at_once(
        lambda: approve(model, open_registry(), store, ANA, version=1),
        lambda: promote.run(plan.run_uri, store=store, tracker=open_tracker(mlflow_server)),
    )
    now = aliases(mlflow_server, model)["champion"]
    if release.status == "promoted":  # then the approval either lost, or was asked when the run's version was there
        assert now == (1 if isinstance(approved, Decision) else 2)
        assert isinstance(approved, Decision) is (getattr(approved, "before", None) == 2)
        assert isinstance(approved, Decision) or "was moved from nothing to version 2 meanwhile" in approved
    else:
        assert (release.status, now) == ("superseded", 1)
        assert "points to version 1 now, and to nothing when the run started" in release.reasons[0]
        assert isinstance(approved, Decision)


@pytest.mark.parametrize("repetition", range(3))
def test_a_rollback_against_a_promotion(repetition, tmp_path, mlflow_server, model, open_registry, finish, store) -> None:
    for seed in range(2):
        finish(seed, "auto")
    plan = make_ready(str(tmp_path / "runs"), store, open_tracker(mlflow_server), model, seed=2)
    back, release = at_once(
        lambda: rollback(model, open_registry(), store, BEN),
        lambda: promote.run(plan.run_uri, store=store, tracker=open_tracker(mlflow_server)),
    )
    now = aliases(mlflow_server, model)["champion"]
    if isinstance(back, Decision) and back.before == 2:
        assert (release.status, now) == ("superseded", 1)
        assert "points to version 1 now, and to version 2 when the run started" in release.reasons[0]
    else:
        assert release.status == "promoted"
        assert now == (back.now if isinstance(back, Decision) else 3)
        assert isinstance(back, Decision) or "was moved from version 2 to version 3 meanwhile (promoted by" in back


def test_one_decision_of_several_about_one_version(mlflow_server, model, open_registry, finish, store) -> None:
    finish(0)
    done = at_once(
        lambda: approve(model, open_registry(), store, ANA, version=1),
        lambda: reject(model, open_registry(), BEN, version=1),
        lambda: reject(model, open_registry(), ANA, version=1),
    )
    assert sum(isinstance(each, Decision) for each in done) == 1
    status = statuses(mlflow_server, model)[1]
    assert aliases(mlflow_server, model) == ({"champion": 1} if status == "promoted" else {})
    assert len([line for line in history(model, open_registry()) if line.event.what in ("approved", "rejected")]) == 1


@pytest.mark.parametrize("where", ["registered-models/alias", "model-versions/set-tag", "delete-tag"])
def test_an_answer_that_got_lost(where, mlflow_proxy: Proxy, model, finish, store) -> None:
    """Asked again, as the message says, it is rolled back once, however far the first attempt came."""
    for seed in range(3):
        finish(seed, "auto")
    registry = open_tracker(mlflow_proxy.uri).registry(model)
    mlflow_proxy.mode, mlflow_proxy.where = "forgetful", where
    if where == "delete-tag":  # all is done but to say that the turn is over
        rollback(model, registry, store, BEN)
    else:
        with pytest.raises(TrackingError, match="ask again with --to 2"):
            rollback(model, registry, store, BEN)
    mlflow_proxy.mode = "up"
    if where != "delete-tag":
        assert rollback(model, registry, store, BEN, to=2).before == 3
    assert aliases(mlflow_proxy.uri, model) == {"champion": 2}
    assert statuses(mlflow_proxy.uri, model) == {1: "promoted", 2: "promoted", 3: "rolled-back"}
    assert told(model, registry)[3:] == [("rolled-back", 3, "Ben")]
    with pytest.raises(RefusedError, match="points to version 2 already"):
        rollback(model, registry, store, BEN, to=2)


@pytest.mark.parametrize("where", ["registered-models/alias", "model-versions/set-tag"])
def test_an_approval_whose_answer_got_lost_is_asked_for_again(where, mlflow_proxy: Proxy, model, finish, store) -> None:
    finish(0)
    registry = open_tracker(mlflow_proxy.uri).registry(model)
    mlflow_proxy.mode, mlflow_proxy.where = "forgetful", where
    with pytest.raises(TrackingError):
        approve(model, registry, store, ANA)
    mlflow_proxy.mode = "up"
    assert approve(model, registry, store, ANA).now == 1
    assert (aliases(mlflow_proxy.uri, model), statuses(mlflow_proxy.uri, model)) == ({"champion": 1}, {1: "promoted"})
    assert [what for what, _, _ in told(model, registry)] == ["candidate", "approved"]


def test_a_rollback_that_was_done_by_hand_is_written_down(mlflow_server, model, registry, finish, store) -> None:
    for seed in range(2):
        finish(seed, "auto")
    client(mlflow_server).set_registered_model_alias(model, "champion", "1")
    assert rollback(model, registry, store, BEN, to=1).before == 2
    assert statuses(mlflow_server, model) == {1: "promoted", 2: "rolled-back"}
    assert told(model, registry)[2:] == [("rolled-back", 2, "Ben")]


def test_the_webhook_is_told_and_may_be_dead(webhook: Webhook, mlflow_server, model, registry, finish, store) -> None:
    for seed in range(2):
        finish(seed)
        approve(model, registry, store, ANA)
    rollback(model, registry, store, BEN)
    finish(2)
    webhook.answers.append(500)
    webhook.answers.append(500)
    reject(model, registry, BEN)
    told = [(sent["status"], sent["version"]) for sent in webhook.sent[:4]]
    assert told == [("approved", 1), ("approved", 2), ("rolled-back", 1), ("rejected", 3)]
    assert webhook.sent[2]["text"].startswith(f"camopd: {model} was rolled back from version 2 to 1\n")
    assert "complaints since Monday (Ben)" in webhook.sent[2]["text"]
    assert webhook.sent[0]["report"].endswith("report.html")
    assert statuses(mlflow_server, model) == {1: "promoted", 2: "rolled-back", 3: "rejected"}


# --- The command line -----------------------------------------------------------------------------------------------------


def camopd(*arguments: str, uri: str = "", code: int = 0, **environment: str) -> str:
    """Output of a command, or what it says on standard error where it is to fail."""
    known = {**os.environ, **environment} | ({"MLFLOW_TRACKING_URI": uri} if uri else {})
    command = [sys.executable, "-c", "from camopd.cli import main; main()", *arguments]
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_command_line(mlflow_server, model, finish) -> None:
    finish(0, "auto")
    plan = finish(1)
    said = camopd("approve", model, "--why", "read 50 answers", uri=mlflow_server, CAMOPD_USER="Ana Lima")
    assert f"{model} approved: alias champion points to version 2, before to version 1" in said
    said = camopd("rollback", model, "--by", "Ben", "--why", "complaints", "--tracking-uri", mlflow_server)
    assert "rolled back: alias champion points to version 1, before to version 2" in said
    assert "every file" in said
    shown = camopd("history", model, uri=mlflow_server)
    assert "version 2  approved  champion: 1 -> 2" in shown
    assert "version 2  rolled-back  champion: 2 -> 1" in shown
    assert "by Ana Lima" in shown
    assert "recovered general 0.610 (0.550 to 0.700)" in shown
    records = json.loads(camopd("history", model, "--json", uri=mlflow_server))
    assert [record["what"] for record in records] == ["promoted", "candidate", "approved", "rolled-back"]
    assert records[1]["run_uri"] == plan.run_uri

    finish(2)
    assert "version 3 is rejected" in camopd("reject", model, "--by", "Ben", "--why", "no", uri=mlflow_server)
    assert "has no candidate" in camopd("approve", model, "--by", "a", "--why", "b", uri=mlflow_server, code=1)
    assert "--by" in camopd("approve", model, "--why", "b", uri=mlflow_server, code=2)
    assert "MLFLOW_TRACKING_URI" in camopd("history", model, code=1)
