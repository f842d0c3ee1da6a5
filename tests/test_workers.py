"""Processes of one stage: what they return, and how every kind of failure ends in one sentence and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from camopd.errors import InputError, UnhealthyRunError, WorkerError
from camopd.workers import check_devices, run_workers

pytestmark = pytest.mark.slow
FAIL = "tests.failing:fail"


def gone(pids: Sequence[int], seconds: float = 10) -> bool:
    """Whether none of the processes runs any more (a zombie does not)."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    until = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(runs, pids))


def pids_in(folder: Path, count: int) -> list[int]:
    """Process ids that workers have written down."""
    until = time.monotonic() + 60
    while len(found := [path.read_text() for path in folder.iterdir()]) < count or "" in found:
        assert time.monotonic() < until, "the workers did not start"
        time.sleep(0.05)
    return [int(text) for text in found]


def test_more_processes_than_gpus_are_refused_and_the_cpu_is_shared(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_devices(8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_devices(4)
    with pytest.raises(InputError, match=r"train\.num_processes: 8 processes need as many GPUs, and there are 4"):
        check_devices(8)


def test_the_first_process_answers_for_all() -> None:
    assert run_workers("tests.failing:ranks_sum", {"value": 20}, num_processes=3) == 63


def test_a_sentence_of_ours_comes_back_in_its_own_class(tmp_path, capfd) -> None:
    with pytest.raises(UnhealthyRunError, match=r"^the loss is a pear$"):
        run_workers(FAIL, {"how": "unhealthy", "rank": 1, "pids": str(tmp_path)}, num_processes=2)
    assert gone(pids_in(tmp_path, 2), 0)
    assert "Traceback" not in capfd.readouterr().err


def test_bad_input_keeps_all_its_problems() -> None:
    with pytest.raises(InputError, match="2 problems") as caught:
        run_workers(FAIL, {"how": "input", "rank": 0}, num_processes=2)
    assert [str(problem) for problem in caught.value.problems] == ["train.x: is wrong -> mend it", "train.y: is wrong, too"]


def test_a_fault_is_told_by_its_kind_and_one_trace_in_the_log(capfd) -> None:
    """The text of an unexpected error may quote data, so that it is in no record."""
    with pytest.raises(WorkerError, match=r"^process 2 of 2 failed: KeyError, see its trace") as caught:
        run_workers(FAIL, {"how": "fault", "rank": 1}, num_processes=2)
    assert "secret" not in str(caught.value)
    assert capfd.readouterr().err.count("Traceback") == 1


def test_a_killed_process_ends_the_others_at_once(tmp_path) -> None:
    begun = time.monotonic()
    with pytest.raises(WorkerError, match=r"^process 1 of 2 was killed, as happens where memory runs out; lower train\."):
        run_workers(FAIL, {"how": "killed", "rank": 0, "pids": str(tmp_path)}, num_processes=2)
    assert time.monotonic() - begun < 120  # the other would wait a quarter of an hour
    assert gone(pids_in(tmp_path, 2), 0)


def test_a_process_that_hangs_ends_the_wait() -> None:
    with pytest.raises(WorkerError, match=r"^process 1 of 2 failed: \w+, see its trace"):
        run_workers(FAIL, {"how": "hangs", "rank": 1}, num_processes=2, timeout=3)


def test_an_exit_without_a_word_is_told_by_its_code() -> None:
    with pytest.raises(WorkerError, match=r"^process 2 of 2 ended with exit code 7"):
        run_workers(FAIL, {"how": "exit", "rank": 1}, num_processes=2)


def test_workers_end_with_the_process_that_started_them(tmp_path) -> None:
    arguments = {"how": "hangs", "rank": 1, "pids": str(tmp_path)}
    code = f"from camopd.workers import run_workers; run_workers({FAIL!r}, {arguments!r}, num_processes=2)"
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}) as starter:
        pids = pids_in(tmp_path, 2)
        assert not gone(pids, 0)
        starter.send_signal(signal.SIGKILL)
    assert gone(pids)
