"""Lets several trainings take turns on one processor: a block of updates each, then standing still until asked again.

A contestant is a process of its own. It reads one JSON line a command and answers each with one:

    {"updates": 20}       trains on; answers with the block's seconds by the clock and by the processor, and the memory's peak
    {"save": "folder"}    writes the student as it is now

The end of its input ends it. Needs nothing but Python, so that it runs in TRL's environment too.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def peak_mib() -> float:
    """Peak resident memory of this process, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss starts from what the parent process had
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Turns:
    """A contestant's side. Making one waits for the first command.

    Args:
        save: writes the student into a folder.
    """

    def __init__(self, save: Callable[[str], object]) -> None:
        self._save = save
        self._loaded = peak_mib()
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print must not stand among the answers
        self._wait()

    def update_done(self) -> None:
        """Count an update; at the end of a block answer, and wait for the next command."""
        self._left -= 1
        if self._left == 0:
            seconds, processor = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
            self._answer(seconds=seconds, processor_seconds=processor, peak_mib=peak_mib(), loaded_mib=self._loaded)
            self._wait()

    def _wait(self) -> None:
        while line := sys.stdin.readline():
            command = json.loads(line)
            if "updates" in command:
                self._left = command["updates"]
                self._begun = time.perf_counter(), time.process_time()
                return
            self._save(command["save"])
            self._answer()
        raise SystemExit

    def _answer(self, **numbers: float) -> None:
        self._answers.write(json.dumps(numbers) + "\n")
