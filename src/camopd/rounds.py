"""Whether a round may start. Works from manifests alone: a CPU pod asks this before anything that wants a GPU."""

from __future__ import annotations

import json
from typing import Literal

from camopd import plan as layout
from camopd.errors import StoreError
from camopd.plan import Plan
from camopd.store import Store


def begin(round_uri: str, *, store: Store | None = None) -> Literal["go", "done", "stop"]:
    """``done`` when the round has its checkpoint, ``stop`` when the run has stopped itself, else ``go``.

    Raises:
        StoreError: the plan or the round before is missing: starting here would skip updates.
    """
    store = store or Store()
    run_uri, number = layout.run_and_round(round_uri)
    store.require(layout.plan_uri(run_uri))
    if store.manifest(layout.checkpoint_uri(round_uri)) is not None:
        return "done"
    if stop_reason(run_uri, store=store) is not None:
        return "stop"
    before = layout.checkpoint_uri(layout.round_uri(run_uri, number - 1))
    if number > 1 and store.manifest(before) is None:
        raise StoreError(f"round {number} cannot start: round {number - 1} has no checkpoint at {before}; run it first")
    return "go"


def begin_turn(round_uri: str, *, store: Store | None = None) -> Literal["go", "shards", "done", "stop"]:
    """``begin``, and ``shards`` in place of ``go`` where several pods share the round's sampling and scoring."""
    store = store or Store()
    state, (run_uri, _) = begin(round_uri, store=store), layout.run_and_round(round_uri)
    return "shards" if state == "go" and Plan.load(store, run_uri).recipe.shards > 1 else state


def record_stop(run_uri: str, *, stage: str, round_number: int, reason: str, store: Store) -> None:
    """Write down why the run stopped itself; the first reason stays."""
    record = {"stage": stage, "round": round_number, "reason": reason}
    store.write(layout.stop_uri(run_uri), json.dumps(record, indent=1).encode(), if_absent=True)


def stop_reason(run_uri: str, *, store: Store) -> str | None:
    """Why the run stopped itself, or None."""
    if store.stat(layout.stop_uri(run_uri)) is None:
        return None
    record = json.loads(store.read(layout.stop_uri(run_uri)))
    return f"round {record['round']}, {record['stage']}: {record['reason']}"
