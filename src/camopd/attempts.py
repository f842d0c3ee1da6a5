"""Attempts that end without a word, and the ways in which one can still have the last.

What is killed outright (exit code 137: out of memory, mostly) can tell nobody. So each stage writes down that it has begun and
that it has ended, and the next attempt finds what is missing. SIGTERM, as of an evicted pod, leaves some seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from camopd.errors import CamopdError
from camopd.store import Store, join

log = logging.getLogger(__name__)

TERMINATED = 143  # exit code of a process that SIGTERM has ended
CLEAN_UP = 8  # seconds after SIGTERM in which a process may end in order; Kubernetes kills after 30, often less
REMEDIES = {
    "rollout": "lower rollout.batch_size",
    "score": "lower score.batch_tokens",
    "train": "lower train.batch_tokens",
    "evaluate": "lower evaluate.batch_size",
}


# --- Records --------------------------------------------------------------------------------------------------------------


def attempt_uri(run_uri: str, output_uri: str) -> str:
    """``<run>/rounds/0001/train -> <run>/attempts/rounds-0001-train.json``: whether a stage's last attempt has ended."""
    return join(run_uri, "attempts", output_uri.removeprefix(run_uri).strip("/").replace("/", "-") + ".json")


def cut_off_uri(run_uri: str) -> str:
    """Prefix of a record for each attempt that ended without a word."""
    return join(run_uri, "cut-off")


def failed_uri(run_uri: str) -> str:
    """Prefix of a record for each attempt that ended, with a word, before its stage was done: the ledger counts its time."""
    return join(run_uri, "failed")


def begin_attempt(run_uri: str, stage: str, output_uri: str, store: Store) -> float:
    """Write down that a stage begins; when the attempt before it has left no end, say so and keep it in the run's records.

    Returns when it was, in seconds since 1970.
    """
    uri = attempt_uri(run_uri, output_uri)
    before = _read(uri, store)
    if before.get("state") == "begun":
        log.warning(
            "%s: the attempt before this one ended without a word (as when the node or the container is killed, exit 137, "
            "often for lack of memory); where it happens again, %s",
            output_uri,
            remedy(stage),
        )
        name = uri.rpartition("/")[2].removesuffix(".json")
        store.write(join(cut_off_uri(run_uri), f"{name}-{before['time']:.0f}.json"), json.dumps(before, indent=1).encode())
    begun = time.time()
    record = {"stage": stage, "output": output_uri, "state": "begun", "time": begun}
    store.write(uri, json.dumps(record, indent=1).encode())
    return begun


def end_attempt(run_uri: str, stage: str, output_uri: str, store: Store, *, begun: float) -> None:
    """Write down that a stage that began at ``begun`` has ended, and keep the time of one that is not done."""
    now = time.time()
    record: dict[str, Any] = {"stage": stage, "output": output_uri, "state": "ended", "time": now}
    uri = attempt_uri(run_uri, output_uri)
    store.write(uri, json.dumps(record, indent=1).encode())
    if store.manifest(output_uri) is None:
        record |= {"begun": begun, "seconds": round(now - begun, 3)}
        name = uri.rpartition("/")[2].removesuffix(".json")
        store.write(join(failed_uri(run_uri), f"{name}-{begun:.3f}.json"), json.dumps(record, indent=1).encode())


def failed_seconds(run_uri: str, store: Store) -> dict[str, float]:
    """Seconds of attempts that failed and left a word, by the prefix that they were to write."""
    found: dict[str, float] = {}
    for file in store.list(failed_uri(run_uri)):
        record = _read(join(failed_uri(run_uri), file.name), store)
        found[record["output"]] = found.get(record["output"], 0.0) + record["seconds"]
    return found


def remedy(stage: str) -> str:
    """What helps a stage that is killed for lack of memory."""
    more = "give the step more memory"
    return f"{REMEDIES[stage]} or {more}" if stage in REMEDIES else more


def cut_offs(run_uri: str, store: Store) -> dict[str, int]:
    """How many attempts of a stage ended without a word, by the prefix that the stage writes, relative to the run."""
    found: dict[str, int] = {}
    for file in store.list(cut_off_uri(run_uri)):
        name = file.name.removesuffix(".json").rpartition("-")[0]
        found[name] = found.get(name, 0) + 1
    return found


def silent_stages(run_uri: str, store: Store) -> dict[str, str]:
    """Stage by the prefix that it writes, of those that have begun and left no end: at work now, or killed."""
    folder = join(run_uri, "attempts")
    records = [_read(join(folder, file.name), store) for file in store.list(folder)]
    return {record["output"]: record["stage"] for record in records if record.get("state") == "begun"}


def _read(uri: str, store: Store) -> dict[str, Any]:
    return json.loads(store.read(uri)) if store.stat(uri) is not None else {}


@contextlib.contextmanager
def attempt(run_uri: str, stage: str, output_uri: str, store: Store) -> Iterator[None]:
    """The records around a stage that is not finished yet, and SIGTERM heeded while it is at work."""
    told = store.manifest(output_uri) is None
    with heeding_sigterm():
        begun = begin_attempt(run_uri, stage, output_uri, store) if told else 0.0
        try:
            yield
        finally:
            if told:
                with contextlib.suppress(CamopdError, OSError):  # what fails may be the store itself
                    end_attempt(run_uri, stage, output_uri, store, begun=begun)


# --- SIGTERM --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def heeding_sigterm(*, at_once: bool = False) -> Iterator[None]:
    """SIGTERM becomes SystemExit(143) in the main thread, so that engines and workers are closed on the way out.

    What cannot be closed in time does not keep the process: it is gone within ten seconds.

    Args:
        at_once: end the process here, when all within is closed, without waiting for threads that still upload.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except SystemExit as stop:
        if at_once and stop.code == TERMINATED:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(TERMINATED)
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is _leave:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(CLEAN_UP)  # the kernel's, since a process that hangs on its way out runs no Python any more
    raise SystemExit(TERMINATED)
