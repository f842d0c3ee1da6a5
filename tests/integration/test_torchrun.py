"""Training by torchrun, on one node and on two that share nothing but the store, as a job's pods start it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camopd import plan as layout
from camopd.errors import UnhealthyRunError
from camopd.failures import failure_of, failure_uri
from camopd.partial import partial_uri
from camopd.store import Store, join
from tests.integration.runs import ROOT, environment
from tests.integration.scored import STEPS, copied, scored_run, trained
from tests.test_student import moments_of, tensors_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_run(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def by_two(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of the round, trained by `camopd train` with two processes."""
    round_uri = copied(scored, tmp_path_factory.mktemp("two") / "run", num_processes=2)
    assert trained(round_uri).returncode == 0
    return round_uri


def torchrun(round_uri: str, *options: str, **extra: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "camopd.train", round_uri]
    extra = {"PYTHONPATH": paths, **extra}
    return subprocess.Popen(command, cwd=ROOT, env=environment(**extra), stderr=subprocess.PIPE, text=True)


def content(round_uri: str) -> str:
    return Store().require(layout.checkpoint_uri(round_uri)).content_id


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_torchrun_makes_what_camopd_train_makes(scored, by_two, tmp_path) -> None:
    """To the bit with as many processes, and to float tolerance as one does."""
    round_uri = copied(scored, tmp_path / "run")
    process = torchrun(round_uri, "--standalone", "--nproc-per-node", "2")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert content(round_uri) == content(by_two)

    alone = copied(scored, tmp_path / "alone")
    assert trained(alone).returncode == 0
    ours, theirs = (Path(layout.checkpoint_uri(uri)) for uri in (round_uri, alone))
    for mine, other in (
        (tensors_of(ours, "model*.safetensors"), tensors_of(theirs, "model*.safetensors")),
        (moments_of(ours), moments_of(theirs)),
    ):
        assert mine.keys() == other.keys()
        for key, tensor in other.items():
            torch.testing.assert_close(mine[key], tensor, atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_two_nodes_that_share_the_store_alone(scored, by_two, s3_server, s3_prefix, tmp_path) -> None:
    """Each with a cache of its own, so that every part of the checkpoints, inside the round, too, goes through the store."""
    run = Path(layout.run_and_round(copied(scored, tmp_path / "run", checkpoint_every=5))[0])
    bucket, _, key = s3_prefix.removeprefix("s3://").partition("/")
    for path in (path for path in run.rglob("*") if path.is_file()):
        s3_server.client().upload_file(str(path), bucket, f"{key}/run/{path.relative_to(run).as_posix()}")
    round_uri, port = layout.round_uri(f"{s3_prefix}/run", 1), free_port()
    nodes = [
        torchrun(
            round_uri,
            *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"),
            *("--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"),
            CAMOPD_CACHE=str(tmp_path / f"node-{number}"),
        )
        for number in range(2)
    ]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert content(round_uri) == content(by_two)
    assert not Store().verify(layout.checkpoint_uri(round_uri), deep=True)
    assert Store().require(layout.checkpoint_uri(round_uri)).metrics["checkpoint_seconds"] > 0
    assert not Store().list(partial_uri(round_uri))


def test_a_process_that_fails_leaves_word_and_the_next_attempt_forgets_it(scored, tmp_path) -> None:
    """A gap that any engine has, so that all stop; then the setting is mended."""
    round_uri = copied(scored, tmp_path / "run", max_engine_gap=1e-12)
    store, options = Store(), ("--standalone", "--nproc-per-node", "2")
    process = torchrun(round_uri, *options)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "Error: mean |log p_engine - log p_trainer| is" in said
    record = json.loads(store.read(failure_uri(round_uri)))
    assert (record["type"], record["rank"] in (0, 1)) == ("UnhealthyRunError", True)
    error = failure_of(round_uri, store)
    assert isinstance(error, UnhealthyRunError)
    assert str(error) == record["message"]
    assert store.manifest(layout.checkpoint_uri(round_uri)) is None

    recipe = tmp_path / "run" / "recipe.json"
    recipe.write_text(recipe.read_text().replace("1e-12", "0.1"))
    process = torchrun(round_uri, *options)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert store.stat(failure_uri(round_uri)) is None
    assert failure_of(round_uri, store) is None
    assert len(json.loads(store.read(join(layout.checkpoint_uri(round_uri), "steps.json")))) == STEPS


def test_a_process_without_torchrun_says_how_to_start_it(scored) -> None:
    command = [sys.executable, "-m", "camopd.train", layout.round_uri(str(scored), 1)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: torchrun")
