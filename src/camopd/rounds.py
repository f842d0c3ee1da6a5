"""Whether a round may start. Works from the run's records alone: a CPU pod asks this before anything that wants a GPU."""

from __future__ import annotations

import json
from typing import Literal

from camopd import plan as layout
from camopd.errors import StoreError
from camopd.past import known, require_files
from camopd.plan import Plan
from camopd.store import Store


def begin(round_uri: str, *, store: Store | None = None) -> Literal["go", "done", "stop"]:
    """``done`` when the round has its checkpoint or had it, ``stop`` when the run has stopped itself, else ``go``.

    Raises:
        StoreError: the plan or the round before is missing: starting here would skip updates.
    """
    store = store or Store()
    run_uri, number = layout.run_and_round(round_uri)
    store.require(layout.plan_uri(run_uri))
    if known(layout.checkpoint_uri(round_uri), store) is not None:
        return "done"
    if stop_reason(run_uri, store=store) is not None:
        return "stop"
    before = layout.checkpoint_uri(layout.round_uri(run_uri, number - 1))
    if number > 1 and known(before, store) is None:
        raise StoreError(f"round {number} cannot start: round {number - 1} has no checkpoint at {before}; run it first")
    if number > 1:
        require_files(before, store)
    return "go"


def begin_turn(round_uri: str, *, store: Store | None = None) -> Literal["go", "shards", "colocated", "done", "stop"]:
    """What a turn of the pipeline's loop is to do: as ``begin``, with ``shards`` in place of ``go`` where several pods share
    the round's sampling and scoring, and ``colocated`` where one process is to do the whole run.

    In that case the loop has a single turn, over the last round's prefix, and that process asks ``begin`` for each round.

    Raises:
        StoreError: as ``begin``.
    """
    store = store or Store()
    run_uri, _ = layout.run_and_round(round_uri)
    recipe = Plan.load(store, run_uri).recipe
    if recipe.execution == "staged" or known(layout.checkpoint_uri(round_uri), store) is not None:
        state = begin(round_uri, store=store)
        return "shards" if state == "go" and recipe.shards > 1 else state
    return "stop" if stop_reason(run_uri, store=store) is not None else "colocated"


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
