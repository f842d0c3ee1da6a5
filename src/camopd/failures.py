"""Why a process failed, as a record that another can read and raise again in its own class.

Processes of one machine leave it in a folder (camopd.workers); those that torchrun starts, on nodes that share nothing but the
store, leave one ``train-failure.json`` beside the round's prefixes.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from camopd import errors
from camopd.errors import CamopdError, InputError, Problem, WorkerError
from camopd.store import Store, join

PATIENCE = 1.0  # seconds that a fault waits for a sentence of ours: who loses a neighbour fails as well


def described(error: Exception) -> dict[str, Any]:
    """What there is to say of an error, JSON. That of a fault holds its trace, which may quote data and belongs into a log."""
    record: dict[str, Any] = {"type": type(error).__name__, "message": str(error), "time": time.time()}
    if isinstance(error, InputError):
        return record | {"problems": [asdict(problem) for problem in error.problems]}
    return record if isinstance(error, CamopdError) else record | {"trace": traceback.format_exc()}


def revived(record: Mapping[str, Any]) -> CamopdError:
    """The error of a record, in its own class: an unhealthy run must stay one."""
    if record["type"] == InputError.__name__ and "problems" in record:
        return InputError(Problem(**problem) for problem in record["problems"])
    kind = getattr(errors, record["type"], WorkerError)
    return kind(record["message"])


def of_fault(name: str, rank: int, size: int) -> WorkerError:
    """The sentence on an error that is none of ours, whose own text may quote data."""
    return WorkerError(f"process {rank + 1} of {size} failed: {name}, see its trace in the log of this step")


# --- In the store ---------------------------------------------------------------------------------------------------------


def failure_uri(round_uri: str) -> str:
    return join(round_uri, "train-failure.json")


def leave_failure(round_uri: str, error: Exception, *, rank: int, size: int, store: Store) -> None:
    """Write down why a process of a round's training failed: ``type``, ``message`` and ``rank``.

    The first sentence of ours counts, and a fault where there is none.
    """
    ours = isinstance(error, CamopdError)
    record = described(error if isinstance(error, CamopdError) else of_fault(type(error).__name__, rank, size))
    if not ours:
        time.sleep(PATIENCE)
    data = json.dumps(record | {"rank": rank}, indent=1, ensure_ascii=False).encode()
    if not store.write(failure_uri(round_uri), data, if_absent=True) and failure_of(round_uri, store) is None:
        store.write(failure_uri(round_uri), data)  # where forget_failure could not delete


def failure_of(round_uri: str, store: Store) -> CamopdError | None:
    """The error that ended the round's last attempt to train, or None where no process left one."""
    uri = failure_uri(round_uri)
    record = json.loads(store.read(uri)) if store.stat(uri) is not None else {}
    return revived(record) if record else None


def forget_failure(round_uri: str, store: Store) -> None:
    """What an earlier attempt left is not about this one."""
    uri = failure_uri(round_uri)
    if store.stat(uri) is not None and not store.remove(uri):
        store.write(uri, b"{}")  # where nothing may be deleted
