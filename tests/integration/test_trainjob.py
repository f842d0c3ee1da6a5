"""A round trained by a TrainJob of two nodes that really run: launched, followed, failed and cancelled as on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camopd import plan as layout
from camopd import workflow
from camopd.errors import UnhealthyRunError, WorkerError
from camopd.rounds import stop_reason
from camopd.store import Store
from camopd.trainjob import JobSpec, follow, job_name
from tests.fixtures.torchrun_nodes import nodes_for
from tests.integration.runs import ROOT, environment
from tests.integration.scored import STEPS, copied, scored_run, trained

pytestmark = pytest.mark.slow

SPEC = JobSpec(
    nodes=2,
    runtime="torch-distributed",
    image="camopd/trainer",
    env={"OMP_NUM_THREADS": "1"},
    secrets={"HF_TOKEN": "hub/token"},
)
SECRETS = {"hub/token": "not-a-secret"}
JOB = SPEC.model_dump_json(exclude_defaults=True)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_run(tmp_path_factory.mktemp("scored"))


def test_two_nodes_make_what_two_processes_of_one_machine_make(scored, kubernetes, tmp_path, capsys):
    by_two = copied(scored, tmp_path / "two", num_processes=2)
    assert trained(by_two).returncode == 0
    round_uri = copied(scored, tmp_path / "run")
    with nodes_for(kubernetes, SECRETS) as nodes:
        done = workflow.train(round_uri, job=JOB)
        assert [process.poll() for process in nodes.processes()] == [0, 0]
    ours, theirs = (Store().require(layout.checkpoint_uri(uri)) for uri in (round_uri, by_two))
    assert ours.content_id == theirs.content_id
    assert done.metrics["num_steps"] == STEPS
    out = capsys.readouterr()
    assert f"[node 0] train round 1/2 domain: {STEPS}/{STEPS} steps" in out.out
    assert "not-a-secret" not in out.out + out.err
    assert kubernetes.jobs == {}


def test_the_reason_of_a_failure_comes_back_from_the_pods(scored, kubernetes, tmp_path):
    """A gap that any engine has; the run stops itself, as it would on one machine. Mended, the next attempt makes a new job."""
    round_uri = copied(scored, tmp_path / "run", max_engine_gap=1e-12)
    run_uri, _ = layout.run_and_round(round_uri)
    with nodes_for(kubernetes, SECRETS):
        with pytest.raises(
            UnhealthyRunError, match=r"^mean \|log p_engine - log p_trainer\| is .* remove the round's rollout$"
        ):
            workflow.train(round_uri, job=JOB)
        assert "log p_trainer" in str(stop_reason(run_uri, store=Store()))
        assert job_name(round_uri) in kubernetes.jobs

        recipe = tmp_path / "run" / "recipe.json"
        recipe.write_text(recipe.read_text().replace("1e-12", "0.1"))
        assert workflow.train(round_uri, job=JOB).metrics["num_steps"] == STEPS
    assert kubernetes.asked.count(("create", "trainjobs")) == 2


def test_a_node_whose_memory_runs_out_is_said_in_words(scored, kubernetes, tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "GRACE", 5.0)
    round_uri = copied(scored, tmp_path / "run")
    with (
        nodes_for(kubernetes, SECRETS, memory=0),
        pytest.raises(WorkerError, match=r"node 0 of 2 was killed \(OOMKilled\).*more memory"),
    ):
        workflow.train(round_uri, job=JOB)


def test_a_step_that_is_cancelled_leaves_no_pod(scored, kubernetes, tmp_path):
    round_uri = copied(scored, tmp_path / "run")
    code = f"from camopd.workflow import train; train({round_uri!r}, job={JOB!r})"
    extra = {"KUBECONFIG": str(kubernetes.kubeconfig), "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with nodes_for(kubernetes, SECRETS) as nodes:
        begun = time.monotonic()
        step = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(**extra))
        while not nodes.processes():
            assert step.poll() is None, "it ended before the job was made"
            assert time.monotonic() - begun < 120, "the job is not made"
            time.sleep(0.05)
        begun = time.monotonic()
        step.send_signal(signal.SIGTERM)
        assert step.wait(10) == 143
        assert kubernetes.deleted == [(job_name(round_uri), "Foreground")]
        while kubernetes.jobs:
            assert time.monotonic() - begun < 20, "the pods do not end"
            time.sleep(0.1)
        assert None not in [process.poll() for process in nodes.processes()]
    assert Store().manifest(layout.checkpoint_uri(round_uri)) is None
