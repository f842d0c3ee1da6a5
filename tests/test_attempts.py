"""Attempts that ended without a word, by their records; SIGTERM in a process of its own."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from camopd.attempts import attempt, begin_attempt, cut_offs, silent_stages
from camopd.errors import UnhealthyRunError
from camopd.store import Store, join


def finish(output: str) -> None:
    Store().produce(output, stage="train", config={}, inputs={}, write=lambda folder: {})


def test_an_attempt_without_an_end_is_told_by_the_next(tmp_path, caplog) -> None:
    run, store = str(tmp_path), Store()
    output = join(run, "rounds", "0002", "train")
    with caplog.at_level(logging.WARNING):
        with attempt(run, "train", output, store):
            assert silent_stages(run, store) == {output: "train"}
        with pytest.raises(UnhealthyRunError), attempt(run, "train", output, store):
            raise UnhealthyRunError("it drifts")
        begin_attempt(run, "train", output, store)  # and is killed
        assert not caplog.records
        assert not cut_offs(run, store)
        with attempt(run, "train", output, store):
            finish(output)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{output}: the attempt before this one ended without a word (as when the node or the container is killed, exit 137, "
        "often for lack of memory); where it happens again, lower train.batch_tokens or give the step more memory"
    )
    assert cut_offs(run, store) == {"rounds-0002-train": 1}
    assert not silent_stages(run, store)


def test_a_finished_stage_leaves_no_new_record(tmp_path) -> None:
    run, store = str(tmp_path), Store()
    output = join(run, "rounds", "0001", "select")
    finish(output)
    with attempt(run, "select", output, store):
        pass
    assert not store.list(join(run, "attempts"))


CLEANS_UP = """
import sys, time
from camopd.attempts import heeding_sigterm

with heeding_sigterm():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except Exception:
        print("swallowed")
    finally:
        print("closed", flush=True)
        {after}
"""


@pytest.mark.parametrize(
    ("after", "code"), [("pass", 143), pytest.param("time.sleep(60)", -signal.SIGALRM, marks=pytest.mark.slow)]
)
def test_sigterm_closes_what_is_open_and_never_waits_long(after, code) -> None:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-c", CLEANS_UP.format(after=after)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == code
        assert time.monotonic() - begun < 10
        assert process.stdout.read() == "closed\n"
