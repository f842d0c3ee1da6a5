"""The training stage on several processes, started as a user starts it, on the micro example."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from camopd import plan as layout
from camopd import workflow
from camopd.errors import InputError
from camopd.store import Store
from tests.integration.runs import ROOT, SMALL, command, environment
from tests.test_student import moments_of, tensors_of

pytestmark = pytest.mark.slow
WISH = SMALL | {"train.diagnose_every": "3"}


@pytest.fixture(autouse=True)
def _no_tracking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def prepared(output: Path, num_processes: int) -> str:
    return workflow.prepare("micro", {**WISH, "output": str(output), "train.num_processes": num_processes}).uri


def scored(output: Path, num_processes: int) -> str:
    """Prefix of a first round for which all but the training is done."""
    uri = layout.round_uri(prepared(output, num_processes), 1)
    for score_uri in workflow.rollout(uri).score_uris:
        workflow.score(score_uri)
    workflow.select(uri)
    return uri


def test_rounds_of_one_run_may_have_different_numbers_of_processes(tmp_path, monkeypatch) -> None:
    first, second = (layout.round_uri(prepared(tmp_path / "mixed", 1), number) for number in (1, 2))
    workflow.one_round(first)
    made = Store().require(layout.checkpoint_uri(first))
    assert layout.parent(layout.parent(first)) == prepared(tmp_path / "mixed", 2), "the number is no part of the run's name"
    workflow.train(first)
    assert Store().require(layout.checkpoint_uri(first)) == made, "what is finished is not made again"
    monkeypatch.setenv("CAMOPD_PROGRESS", str(tmp_path / "progress"))
    workflow.one_round(second)
    said = [json.loads(line) for line in (tmp_path / "progress").read_text().splitlines()]
    done = [record["done"] for record in said if record["stage"] == "train"]
    assert (done[-1], len(done)) == (4, len(set(done))), "the first process alone says how far it is"

    alone = prepared(tmp_path / "alone", 1)
    for number in (1, 2):
        workflow.one_round(layout.round_uri(alone, number))
    folders = [Path(layout.checkpoint_uri(uri)) for uri in (second, layout.round_uri(alone, 2))]
    for read in (lambda folder: tensors_of(folder, "model*.safetensors"), moments_of):
        shared, own = map(read, folders)
        assert shared.keys() == own.keys()
        for key, tensor in own.items():
            torch.testing.assert_close(shared[key], tensor, atol=2e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")
    steps = [json.loads((folder / "steps.json").read_text()) for folder in folders]
    assert [step["loss"] for step in steps[0]] == pytest.approx([step["loss"] for step in steps[1]], rel=1e-3)
    assert [["diagnostics" in step for step in own] for own in steps] == [[False] * 4, [False, True, False, False]]


def test_a_killed_process_is_one_sentence_and_the_round_can_be_done_again(tmp_path) -> None:
    uri = scored(tmp_path, 2)
    process = subprocess.Popen(command("train", uri), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    children, until = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
    while len(workers := children.read_text().split()) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(int(workers[1]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    sentence = (
        "process 2 of 2 was killed, as happens where memory runs out; lower train.batch_tokens or give the step more memory"
    )
    assert process.returncode == 1
    assert said.splitlines()[-1] == f"Error: {sentence}"
    assert "Traceback" not in said
    run_uri, _ = layout.run_and_round(uri)
    assert json.loads(Path(run_uri, "error.json").read_text())["reason"] == sentence
    assert not Path(layout.checkpoint_uri(uri)).exists()
    assert workflow.train(uri).metrics["num_steps"] == 4


def test_recover_refuses_several_processes_before_anything_is_read(tmp_path) -> None:
    with pytest.raises(InputError, match=r"train.*num_processes 2 needs the stages: `camopd recover` keeps all models"):
        workflow.run("micro", {"output": str(tmp_path), "execution": "colocated", "train.num_processes": "2"})
    assert not list(tmp_path.iterdir())
