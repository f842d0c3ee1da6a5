"""Training that is stopped in the middle of a round: it goes on from the last good checkpoint, and says what happened."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from camopd import plan as layout
from camopd import workflow
from camopd.attempts import TERMINATED
from camopd.outcome import describe
from camopd.partial import partial_uri
from camopd.plan import Plan
from camopd.store import MANIFEST, Store
from camopd.tracking.logbook import entries
from tests.integration.runs import ROOT, command, environment
from tests.integration.scored import STEPS, copied, pids_below, runs, scored_run, trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_run(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def unbroken(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Content id of the checkpoint of an attempt that nobody stopped, by number of processes."""
    return {number: content(scored, tmp_path_factory.mktemp("whole") / "run", number) for number in (1, 2)}


def content(scored: Path, target: Path, num_processes: int) -> str:
    round_uri = copied(scored, target, num_processes=num_processes)
    done = trained(round_uri)
    assert done.returncode == 0, done.stderr[-3000:]
    return Store().require(layout.checkpoint_uri(round_uri)).content_id


def kept(round_uri: str) -> list[str]:
    """Names of the finished checkpoints in the middle of the round."""
    return sorted(path.parent.name for path in Path(partial_uri(round_uri)).glob(f"*/*/{MANIFEST}"))


def start_and_stop(round_uri: str, how: signal.Signals) -> tuple[int, float, set[int], str]:
    """Start `camopd train` and stop it when it has saved twice: exit code, seconds until it ended, its workers, its words."""
    process = subprocess.Popen(command("train", round_uri), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not kept(round_uri)[-1:] >= ["0002"]:
        assert process.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < until
        time.sleep(0.005)
    workers = pids_below(process.pid)
    process.send_signal(how)
    begun = time.monotonic()
    _, said = process.communicate(timeout=30)
    return process.returncode, time.monotonic() - begun, workers, said


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_round_goes_on_to_the_same_bytes(scored, unbroken, how, num_processes, tmp_path) -> None:
    round_uri = copied(scored, tmp_path / "run", num_processes=num_processes, checkpoint_every=1)
    code, seconds, workers, said = start_and_stop(round_uri, how)
    assert code == (TERMINATED if how == signal.SIGTERM else -how), said[-2000:]
    assert seconds < 10
    assert not still_running(workers)
    assert (len(workers) >= 2) == (num_processes > 1)
    assert not Path(layout.checkpoint_uri(round_uri)).exists()
    (last,) = kept(round_uri)[-1:]

    progress = tmp_path / "progress"
    again = trained(round_uri, CAMOPD_PROGRESS=str(progress))
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(progress.read_text().splitlines()[0])["done"] == int(last) > 0, "it began again"
    store = Store()
    manifest = store.require(layout.checkpoint_uri(round_uri))
    assert manifest.content_id == unbroken[num_processes]
    assert manifest.metrics["num_steps"] == STEPS
    assert 0 < manifest.metrics["checkpoint_seconds"] < manifest.seconds
    assert not Path(partial_uri(round_uri)).exists()

    run_uri, _ = layout.run_and_round(round_uri)
    page = describe(run_uri, succeeded=True, store=store)
    told = {entry.key: entry for entry in entries(Plan.load(store, run_uri), store)}
    if how == signal.SIGKILL:
        assert "the attempt before this one ended without a word" in again.stderr
        assert "lower train.batch_tokens or give the step more memory" in again.stderr
        assert "1 of rounds-0001-train (killed, exit 137" in page
        assert told["cut-off"].facts().tags == {"camopd.attempts_without_a_word": "1 of rounds-0001-train"}
    else:
        assert "without a word" not in again.stderr + page
        assert "cut-off" not in told
        assert json.loads(Path(run_uri, "error.json").read_text())["reason"].startswith("ended by SIGTERM")


def still_running(pids: set[int]) -> set[int]:
    """Those of the processes that are there after ten seconds: they have to notice that their starter is gone."""
    until = time.monotonic() + 10
    while (left := {pid for pid in pids if runs(pid)}) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def test_what_other_inputs_made_is_not_gone_on_from(scored, unbroken, tmp_path) -> None:
    """Half of the updates at another rate; the round is then done at its own, from its start, and nothing is left."""
    round_uri = copied(scored, tmp_path / "run", checkpoint_every=1, learning_rate=1e-3)
    start_and_stop(round_uri, signal.SIGKILL)
    assert kept(round_uri)
    recipe, original = tmp_path / "run" / "recipe.json", scored / "recipe.json"
    recipe.write_text(original.read_text())
    progress = tmp_path / "progress"
    assert trained(round_uri, CAMOPD_PROGRESS=str(progress)).returncode == 0
    assert json.loads(progress.read_text().splitlines()[0])["done"] == 0
    assert Store().require(layout.checkpoint_uri(round_uri)).content_id == unbroken[1]
    assert not Path(partial_uri(round_uri)).exists()


def test_an_attempt_that_was_killed_is_told_while_there_is_no_other(scored, tmp_path) -> None:
    """As the exit handler of a pipeline finds it, whose step was killed."""
    round_uri = copied(scored, tmp_path / "run", checkpoint_every=1)
    start_and_stop(round_uri, signal.SIGKILL)
    page = describe(layout.run_and_round(round_uri)[0], succeeded=False, store=Store())
    assert "was cut off in train" in page
    assert "lower train.batch_tokens or give the step more memory" in page


def test_a_save_that_fails_beside_the_updates_is_an_error_of_the_stage(scored, tmp_path) -> None:
    """A file stands where the checkpoints inside the round belong."""
    round_uri = copied(scored, tmp_path / "run", checkpoint_every=1)
    Path(partial_uri(round_uri)).write_text("in the way")
    with pytest.raises(Exception, match="train-partial"):
        workflow.train(round_uri)
    assert not Path(layout.checkpoint_uri(round_uri)).exists()
