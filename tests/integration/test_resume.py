"""Stopped anywhere, killed included, and started again: the same bytes as a run that was never stopped."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from camopd import plan as layout
from camopd.store import Store
from tests.integration.runs import ROOT, SMALL, camopd, checkpoints, command, environment, the_run, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nobody stopped, and how long it took."""
    output = str(tmp_path_factory.mktemp("unbroken"))
    begun = time.monotonic()
    camopd("run", "micro", settings=SMALL | {"output": output})
    return the_run(output), time.monotonic() - begun


def test_ten_kills_change_nothing(unbroken, tmp_path) -> None:
    reference, seconds = unbroken
    moments = random.Random(7)
    killed = 0
    for _ in range(10):
        process = subprocess.Popen(
            command("run", "micro", **SMALL, output=str(tmp_path)),
            cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(moments.uniform(0.3, 0.8) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    camopd("run", "micro", settings=SMALL | {"output": str(tmp_path)})
    assert killed >= 3  # later attempts find more done and may end before their moment
    assert weights(the_run(str(tmp_path))) == weights(reference)
    assert [m.content_id for m in checkpoints(the_run(str(tmp_path)))] == [m.content_id for m in checkpoints(reference)]


def test_every_verb_alone_makes_the_same_run(unbroken, tmp_path) -> None:
    reference, _ = unbroken
    run_uri = camopd("prepare", "micro", settings=SMALL | {"output": str(tmp_path)}).splitlines()[-1]
    for number in (1, 2):
        round_uri = layout.round_uri(run_uri, number)
        camopd("rollout", round_uri)
        camopd("score", round_uri, "--branch", "general")
        camopd("score", round_uri, "--branch", "domain")
        camopd("select", round_uri)
        camopd("train", round_uri)
    assert weights(run_uri) == weights(reference)
    assert "recovered_general" in camopd("evaluate", run_uri)
    assert '"status": "refused"' in camopd("promote", run_uri)  # so short a run does not pass the gate, and it says so


def test_a_finished_run_does_nothing_again(unbroken) -> None:
    run_uri, _ = unbroken
    store = Store()
    rewritten = {"recipe.json", "settings.md"}  # what was asked for last; the same bytes
    files = {f.name: Path(run_uri, f.name).stat().st_mtime_ns for f in store.list(run_uri)}
    camopd("run", "micro", settings=SMALL | {"output": layout.parent(run_uri)})
    again = {f.name: Path(run_uri, f.name).stat().st_mtime_ns for f in store.list(run_uri)}
    assert files.keys() == again.keys()
    changed = {name for name in files if files[name] != again[name] and not name.startswith("release/")}
    assert changed <= rewritten


def test_more_rounds_continue_the_run(unbroken, tmp_path) -> None:
    reference, _ = unbroken
    for rounds in ("1", "2"):
        camopd("run", "micro", settings=SMALL | {"output": str(tmp_path), "num_rounds": rounds})
    assert weights(the_run(str(tmp_path))) == weights(reference)
