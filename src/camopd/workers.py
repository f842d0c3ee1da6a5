"""Several processes of one stage on one machine, as torchrun would start them: one result, or one sentence when any fails.

Each runs ``python -m camopd.workers FOLDER RANK``; the folder, which is gone afterwards, holds the task, the meeting point of
the process group and what each rank has to say at its end. No port is chosen, and no object of Python's travels.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from camopd.errors import CamopdError, InputError, Problem, WorkerError
from camopd.failures import described, of_fault, revived
from camopd.group import TIMEOUT, join_group

GRACE = 3.0  # seconds after the first failure in which the others may say theirs: they may have been the cause
TAIL = 4000  # characters of the log of a process that died without a word


# --- The process that starts the others -----------------------------------------------------------------------------------


def run_workers(target: str, arguments: Mapping[str, Any], *, num_processes: int, timeout: float = TIMEOUT) -> Any:
    """Call a function in several new processes that form torch's default process group, and wait for all.

    They end with this process, however it ends. When one fails, the others are ended.

    Args:
        target: ``module:function``, which must be importable where this process runs.
        arguments: its keyword arguments, JSON.
        num_processes: how many.
        timeout: seconds after which a process stops waiting for the others.

    Returns:
        What rank 0 returned, as JSON carries it.

    Raises:
        CamopdError: the failing process's own, as it raised it.
        WorkerError: a process died or met another exception; its trace goes to standard error.
    """
    with tempfile.TemporaryDirectory(prefix="camopd-workers-") as scratch:
        folder = Path(scratch)
        task = {"target": target, "arguments": dict(arguments), "num_processes": num_processes, "timeout": timeout}
        (folder / "task.json").write_text(json.dumps(task))
        processes: list[subprocess.Popen[bytes]] = []
        try:
            processes += (_start(folder, rank) for rank in range(num_processes))
            first = _first_failure(processes)
            if first is not None:
                _wait(processes, GRACE)
                raise _cause(folder, [process.poll() for process in processes], first)
        finally:
            for process in processes:
                process.kill()
                process.communicate()  # waits, and closes its pipe
        return _answer(folder, 0)["value"]


def check_devices(num_processes: int) -> None:
    """Raises InputError where there are GPUs, but fewer than processes: each takes one. Without any they share the CPU."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else num_processes
    if found < num_processes:
        what = f"{num_processes} processes need as many GPUs, and there are {found}"
        raise InputError([Problem("train.num_processes", what, "lower it, or ask for a pod with more")])


def _start(folder: Path, rank: int) -> subprocess.Popen[bytes]:
    """A worker with this process's path of imports. The first one shows what it has to say, the others write it to a file."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-m", "camopd.workers", str(folder), str(rank)]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,  # never written to: it closes when this process is gone
            stdout=log if rank else None,
            stderr=log if rank else None,
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
        )


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all have ended well (None) or one has not (its rank)."""
    while True:
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None or not any(code is None for code in codes):
            return failed
        time.sleep(0.02)


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.02)


def _cause(folder: Path, codes: Sequence[int | None], first: int) -> CamopdError:
    """What the failure is about. Who loses a neighbour fails as well, so a sentence of ours counts before a death, and a death
    before a fault; among faults the earliest."""
    told = {rank: _answer(folder, rank).get("error") for rank in range(len(codes))}
    said = {rank: error for rank, error in told.items() if error}
    ours = [rank for rank, error in said.items() if "trace" not in error]
    dead = sorted((rank for rank, code in enumerate(codes) if code and rank not in said), key=lambda rank: rank != first)
    if ours:
        return revived(said[ours[0]])
    if dead:
        rank = dead[0]
        sys.stderr.write((folder / f"{rank}.log").read_text(errors="replace")[-TAIL:])
        return WorkerError(f"process {rank + 1} of {len(codes)} {_death(codes[rank] or 0)}")
    rank = min(said, key=lambda rank: said[rank]["time"])
    sys.stderr.write(said[rank]["trace"])
    return of_fault(said[rank]["type"], rank, len(codes))


def _death(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed, as happens where memory runs out; lower train.batch_tokens or give the step more memory"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}; see the log of this step"
    return f"ended with exit code {code}; see the log of this step"


def _answer(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {}


# --- The processes that are started ---------------------------------------------------------------------------------------


def main(folder: Path, rank: int) -> NoReturn:
    """Join the group, call the target, leave word of how it went."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    task = json.loads((folder / "task.json").read_text())
    try:
        join_group(f"file://{folder}/meeting", rank=rank, size=task["num_processes"], timeout=task["timeout"])
        module, _, name = task["target"].partition(":")
        word = {"value": getattr(import_module(module), name)(**task["arguments"])}
    except Exception as error:  # whatever it is, the process that waits has to be told, and says it
        word = {"error": described(error)}
    written = folder / f"{rank}.part"
    written.write_text(json.dumps(word))
    written.rename(folder / f"{rank}.json")
    while rank and "value" in word and not (folder / "0.json").exists():
        time.sleep(0.02)  # what this process sent last may still be on its way
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if "error" in word else 0)  # at once: taking the group down can wait for a neighbour that is gone


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
