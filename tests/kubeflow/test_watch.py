"""`camopd watch`: progress in words, outages waited for, and at the end the result, or the step that failed and why."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import kfp as sdk
import pytest
from rich.console import Console

from camopd.evaluate import evaluation_uri
from camopd.kubeflow.client import connect
from camopd.kubeflow.watch import watch
from camopd.outcome import error_uri
from camopd.plan import Plan, checkpoint_uri
from camopd.promote import release_uri
from camopd.rounds import record_stop
from camopd.store import Store, join
from tests.finished import make_plan, make_round, produce
from tests.fixtures.kfp_api import KfpApi, node, pod_of, step
from tests.fixtures.kfp_rules import Refused
from tests.fixtures.kfp_server import Page
from tests.kubeflow.conftest import ROOT
from tests.kubeflow.wishes import COMPILED, RECIPE, changed_pipeline, the_run, upload

Camopd = Callable[..., tuple[int, str]]


@pytest.fixture
def run_id(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> str:
    """A run of three rounds whose records would lie in a folder of this machine, which only a test can do."""
    return started(kfp, str(tmp_path / "runs"))


def started(api: KfpApi, output: str, *, version: str = "", **options: Any) -> str:
    version = version or upload(api, **options)
    client = sdk.Client(host=api.host, **options)
    pipeline = api.versions[version]["pipeline_id"]
    experiment = client.create_experiment("mine", namespace=options.get("namespace")).experiment_id
    params = {"input_recipe": RECIPE} | ({"output_uri": output} if output else {})
    return client.run_pipeline(experiment, "tonight-1", params=params, pipeline_id=pipeline, version_id=version).run_id


def at_each_look(api: KfpApi, run_id: str, acts: Iterable[Callable[[], Any]]) -> None:
    """What happens on the cluster, one act before each look at the run but the first."""
    left = iter([lambda: None, *acts])

    def before(method: str, path: str) -> None:
        if method == "GET" and path.endswith(f"/runs/{run_id}"):
            next(left, lambda: None)()

    api.before = before


def watched(camopd: Camopd, api: KfpApi, run_id: str, *arguments: str) -> tuple[int, str]:
    return camopd("watch", run_id, "--host", api.host, *arguments)


def prepared(tmp_path: Path, run_id: str) -> Plan:
    """What prepare leaves: the plan, and word of it for the pipeline run."""
    store = Store()
    plan = make_plan(str(tmp_path / "runs"), store, num_rounds=3)
    store.write(join(str(tmp_path / "runs"), "jobs", f"{run_id}.json"), json.dumps({"run": plan.run_uri}).encode())
    return plan


def raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


ABOVE = ("condition-3", "iteration-item", "iteration-iterations(1:1)", "for-loop-2", "exit-handler-1", "root")
SCORE = {"value": 0.75, "low": 0.5, "high": 0.875}
EVALUATION = {
    "branches": [{"name": "general"}],
    "models": {name: {"label": name, "round": number} for name, number in (("before", 0), ("after", 3))},
    "scores": {name: {"branches": {"general": SCORE}} for name in ("before", "after")},
    "recovered": {"general": SCORE},
    "retained": {},
    "decision": {"passed": True, "reasons": ["general recovered 0.75"]},
}


def test_progress_and_result(kfp: KfpApi, run_id: str, camopd: Camopd, tmp_path: Path) -> None:
    plan, store, at = prepared(tmp_path, run_id), Store(), [kfp.now() for _ in range(40)]
    release = {"model_name": "m", "version": 4, "alias": "champion", "status": "promoted", "reasons": []}

    def finish() -> None:
        for number in (1, 2, 3):
            make_round(plan, store, number)
        produce(store, evaluation_uri(plan, store), "evaluate", {"evaluation.json": json.dumps(EVALUATION)})
        store.write(join(release_uri(plan, store), "release.json"), json.dumps(release).encode())
        kfp.tell(run_id, "SUCCEEDED", step("promote", "SUCCEEDED", at[30], at[31]))

    at_each_look(kfp, run_id, [
        lambda: kfp.tell(run_id, "RUNNING", step("prepare", "RUNNING", at[0], executor="PENDING")),
        lambda: kfp.tell(run_id, "RUNNING", step("prepare", "RUNNING", at[0])),
        lambda: kfp.tell(run_id, "", [*step("prepare", "SUCCEEDED", at[0], at[1]), *step("begin", "RUNNING", at[2])]),
        lambda: kfp.tell(run_id, "", [*step("begin", "SUCCEEDED", at[2], at[3]), *step("rollout", "RUNNING", at[4])]),
        lambda: kfp.tell(run_id, "", step("rollout", "SUCCEEDED", at[4], at[5])),
        lambda: kfp.tell(run_id, "", [*step("score", "SUCCEEDED", at[6], at[9]), *step("score", "RUNNING", at[7])]),
        lambda: kfp.tell(run_id, "", [*step("score", "SUCCEEDED", at[7], at[9]), *step("begin", "RUNNING", at[20])]),
        lambda: kfp.tell(run_id, "", [*step("begin", "SUCCEEDED", at[20], at[21]), *step("evaluate", "RUNNING", at[25])]),
        finish,
    ])  # fmt: skip
    code, said = watched(camopd, kfp, run_id)
    assert code == 0, said
    sentences = [line.partition("  (")[0] for line in said.splitlines()]
    assert sentences[:8] == [
        "waiting to start",
        "prepare  waiting for a pod to start",
        "prepare",
        "round 1/3  begin",
        "round 1/3  rollout",
        "round 1/3  score  1/2 steps",
        "round 2/3  begin",
        "evaluate",
    ]
    assert "0.750 (0.500 to 0.875)" in said
    assert "Gate:     passed" in said
    assert f"Run:      {plan.run_uri}" in said
    assert "Registry: m version 4, alias champion (promoted)" in said


def test_on_a_terminal_the_board_stays_in_place(kfp: KfpApi, run_id: str, tmp_path: Path) -> None:
    plan, at = prepared(tmp_path, run_id), [kfp.now() for _ in range(9)]
    make_round(plan, Store(), 1)
    running = [
        *step("begin", "SUCCEEDED", at[0], at[1]),
        *step("begin", "SUCCEEDED", at[2], at[3]),
        *step("train", "RUNNING", at[4]),
    ]
    at_each_look(kfp, run_id, [lambda: kfp.tell(run_id, "RUNNING", running), lambda: kfp.tell(run_id, "SUCCEEDED")])
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    assert watch(connect(kfp.host), run_id, store=Store(), console=console)
    assert "round 2/3  train" in shown.getvalue()
    assert "━" in shown.getvalue()  # rounds as a bar


def test_where_the_cluster_says_where_runs_go(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    """A run that the UI has started, with nothing in its form."""

    def told(spec: dict[str, Any]) -> None:
        variables = [{"name": "CAMOPD_OUTPUT", "value": str(tmp_path / "runs")}]
        spec["deploymentSpec"]["executors"]["exec-prepare"]["container"]["env"] = variables

    run_id = started(kfp, "", version=upload(kfp, changed_pipeline(tmp_path, told)))
    plan = prepared(tmp_path, run_id)
    kfp.tell(run_id, "FAILED")
    code, said = watched(camopd, kfp, run_id)
    assert code == 1
    assert plan.run_uri in said


def test_a_failed_step_inside_the_loop(kfp: KfpApi, run_id: str, camopd: Camopd, tmp_path: Path) -> None:
    """The second round's training fails: the nodes above it fail later, and evaluation is never started."""
    plan, at, store = prepared(tmp_path, run_id), [kfp.now() for _ in range(40)], Store()
    make_round(plan, store, 1)
    record = {"stage": "train", "output": checkpoint_uri(plan.rounds[1]), "reason": "CUDA out of memory", "time": 0}
    store.write(error_uri(plan.run_uri), json.dumps(record).encode())
    kfp.logs[run_id, pod_of("train", at[11])] = "\n".join(
        ["loading", *(f"step {n}/64" for n in range(40)), "CUDA out of memory", ""]
    )
    kfp.tell(run_id, "FAILED", [
        *step("begin", "SUCCEEDED", at[1], at[2]),
        *step("train", "SUCCEEDED", at[3], at[4]),
        *step("begin", "SUCCEEDED", at[10], at[10]),
        *step("train", "FAILED", at[11], at[12]),
        *(node(name, "FAILED", at[0], at[14]) for name in ABOVE),
        *step("report-outcome", "FAILED", at[15], at[16]),
    ])  # fmt: skip
    code, said = watched(camopd, kfp, run_id)
    assert code == 1
    assert "First step that failed in round 2: Train: update the student (train)" in said
    assert "  step 39/64\n  CUDA out of memory\n" in said
    assert "loading" not in said  # the last lines are enough
    assert "## The recovery failed in train" in said
    assert "**Rounds finished:** 1 of 3" in said
    assert "**Next:** Mend what the reason names." in said


def test_the_log_of_the_last_attempt(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    """Where a pool has retries and labels Argo's names are others."""
    import yaml

    documents = [yaml.safe_load(COMPILED.read_text())]
    tasks = documents[0]["components"]["comp-condition-2"]["dag"]["tasks"]
    tasks["prepare"]["retryPolicy"] = {"maxRetryCount": 2}
    label = documents[0]["components"]["comp-prepare"]["executorLabel"]
    pod = {"podMetadata": {"labels": {"team": "a", "app": "camopd"}}}
    documents.append({"platforms": {"kubernetes": {"deploymentSpec": {"executors": {label: pod}}}}})
    (tmp_path / "retries.yaml").write_text(yaml.safe_dump_all(documents))
    run_id = started(kfp, str(tmp_path / "runs"), version=upload(kfp, tmp_path / "retries.yaml"))
    at = [kfp.now() for _ in range(3)]
    template = "metadata-0-2-retry-system-container-impl"
    for attempt in (1, 2):
        kfp.logs[run_id, pod_of("prepare", at[0], attempt=attempt, template=template)] = f"attempt {attempt}: no such bucket\n"
    kfp.tell(run_id, "FAILED", step("prepare", "FAILED", at[0], at[1], attempts=2))
    code, said = watched(camopd, kfp, run_id)
    assert code == 1
    assert "First step that failed: Prepare: check the inputs (prepare)" in said
    assert "Its last lines:\n  attempt 2: no such bucket\n" in said
    assert "prepare left no word" in said


def test_a_step_whose_pod_was_never_made(kfp: KfpApi, run_id: str, camopd: Camopd) -> None:
    at = [kfp.now() for _ in range(3)]
    kfp.tell(run_id, "FAILED", [node("prepare-driver", "FAILED", at[0], at[1]), node("exit-handler-1", "FAILED", at[0], at[2])])
    code, said = watched(camopd, kfp, run_id)
    assert code == 1
    assert "First step that failed: Prepare: check the inputs, before its pod was started (prepare)" in said
    assert "Its last lines" not in said


def test_a_run_that_stopped_itself(kfp: KfpApi, run_id: str, camopd: Camopd, tmp_path: Path) -> None:
    plan = prepared(tmp_path, run_id)
    record_stop(plan.run_uri, stage="rollout", round_number=2, reason="60 % of the answers are empty", store=Store())
    kfp.tell(run_id, "FAILED")
    code, said = watched(camopd, kfp, run_id)
    assert code == 1
    assert "## The recovery stopped itself" in said
    assert "round 2, rollout: 60 % of the answers are empty" in said


def test_a_run_that_somebody_stops(kfp: KfpApi, run_id: str, camopd: Camopd) -> None:
    """KFP calls it FAILED in the end."""
    at = [kfp.now() for _ in range(3)]
    stop = lambda: kfp.runs[run_id].update(state="CANCELING")  # noqa: E731
    running, ended = step("prepare", "RUNNING", at[0]), step("prepare", "FAILED", at[0], at[1])
    at_each_look(kfp, run_id, [lambda: kfp.tell(run_id, "RUNNING", running), stop, lambda: kfp.tell(run_id, "FAILED", ended)])
    code, said = watched(camopd, kfp, run_id)
    assert code == 1
    assert "being stopped" in said
    assert "The run was stopped by somebody" in said
    assert "First step that was cut off: Prepare: check the inputs" in said


def test_an_outage_is_waited_for(kfp: KfpApi, run_id: str, camopd: Camopd, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    def down() -> None:
        threading.Thread(target=lambda: (kfp.server.stop(), time.sleep(0.3), kfp.server.start())).start()
        raise ConnectionError

    at_each_look(kfp, run_id, [
        lambda: kfp.tell(run_id, "RUNNING"), down, raising(Refused(503, "upstream connect error")),
        raising(Page("<html>Bad Gateway</html>", 502)), lambda: kfp.tell(run_id, "SUCCEEDED"),
    ])  # fmt: skip
    code, said = watched(camopd, kfp, run_id)
    assert code == 0, said
    assert said.count("No word of the run, waiting: ") == 1
    assert "The API answers again, after 0:0" in said


def test_a_token_file_is_waited_for(kfp_teams: KfpApi, camopd: Camopd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = started(kfp_teams, str(tmp_path / "runs"), namespace="team-a", existing_token="token-admin")
    token = tmp_path / "token"
    token.write_text("token-a")
    monkeypatch.setenv("KFP_TOKEN_FILE", str(token))
    looks = [lambda: token.write_text("expired"), lambda: None, lambda: None, lambda: token.write_text("token-a")]
    at_each_look(kfp_teams, run_id, [*looks, lambda: None, lambda: kfp_teams.tell(run_id, "SUCCEEDED")])
    code, said = watched(camopd, kfp_teams, run_id, "--namespace", "team-a")
    assert code == 0, said
    assert "No word of the run, waiting: " in said
    assert "The API answers again" in said


def test_a_fixed_token_is_not(kfp_teams: KfpApi, camopd: Camopd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = started(kfp_teams, str(tmp_path / "runs"), namespace="team-a", existing_token="token-admin")
    monkeypatch.setenv("KFP_TOKEN", "token-a")
    at_each_look(kfp_teams, run_id, [lambda: kfp_teams.access.pop("token-a")])
    code, said = watched(camopd, kfp_teams, run_id, "--namespace", "team-a")
    assert code == 1
    assert f"Follow it again: camopd watch {run_id}" in said
    assert "(401)" in said


def test_a_run_that_is_not_there(kfp: KfpApi, run_id: str, camopd: Camopd) -> None:
    code, said = watched(camopd, kfp, "no-such-run")
    assert code == 1
    assert "Run no-such-run not found" in said
    at_each_look(kfp, run_id, [lambda: kfp.runs.pop(run_id)])
    assert watched(camopd, kfp, run_id)[0] == 1


def test_records_out_of_reach(kfp: KfpApi, camopd: Camopd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    run_id = started(kfp, "s3://models/runs")
    at_each_look(kfp, run_id, [lambda: kfp.tell(run_id, "RUNNING"), lambda: kfp.tell(run_id, "SUCCEEDED")])
    code, said = watched(camopd, kfp, run_id)
    assert code == 0
    assert said.count("The run's records cannot be read from here") == 1
    assert "The run has succeeded." in said
    kfp.tell(run_id, "FAILED", step("prepare", "FAILED", kfp.now(), kfp.now()))
    code, said = watched(camopd, kfp, run_id)
    assert code == 1
    assert "First step that failed: Prepare" in said
    assert "Its records cannot be read from here (s3://models/runs/jobs/" in said
    assert "## The recovery" not in said


def test_ctrl_c_leaves_the_run_alone(kfp: KfpApi, run_id: str) -> None:
    command = [sys.executable, "-c", "from camopd.cli import main; main()", "watch", run_id, "--host", kfp.host]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    assert "waiting to start" in first
    assert process.returncode == 130
    assert f"The run goes on. Follow it again: camopd watch {run_id}" in said
    assert the_run(kfp)["state"] == "PENDING"
    assert ("POST", f"/apis/v2beta1/runs/{run_id}:terminate") not in kfp.asked


def test_submit_follows(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    """One command from recipe to failure: prepare refuses, and its reason is told."""
    upload(kfp)
    path = tmp_path / "tonight.toml"
    path.write_text(RECIPE)
    reason = "1 problem found, nothing was started:\n  1. student: s3://models/domain is not there"

    def before(method: str, path: str) -> None:
        if method == "GET" and "/runs/" in path:
            (run_id,), at = kfp.runs, kfp.now()
            kfp.logs[run_id, pod_of("prepare", at)] = f"Traceback\n{reason}\n"
            kfp.tell(run_id, "FAILED", step("prepare", "FAILED", at, kfp.now()))

    kfp.before = before
    code, said = camopd("submit", str(path), "--preflight", "recipe", "--host", kfp.host)
    assert code == 1
    assert "  1. student: s3://models/domain is not there" in said
