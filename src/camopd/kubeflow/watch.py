"""A run on the cluster is followed to its end: by the steps that the API tells of and, where they can be read, its records."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from rich.console import Console
from rich.live import Live

from camopd.board import Board, clock
from camopd.kubeflow.client import ApiError, Connection
from camopd.kubeflow.records import Records
from camopd.kubeflow.spec import Spec
from camopd.kubeflow.steps import DONE, Step, board_line, failed_step, steps
from camopd.store import Store

EVERY = 10.0  # seconds between two looks
LAST_LINES = 20
LOG = "/apis/v1alpha1/runs/{run}/nodes/{pod}/log"  # of the API server; v2beta1 has none


def watch(connection: Connection, run_id: str, *, store: Store, console: Console) -> bool:
    """Show a run's progress until it has ended, then its result, or which step failed and why. Returns whether it succeeded.

    An API that does not answer is waited for. Stopping this does not stop the run.

    Args:
        connection: to the KFP API.
        run_id: of the run.
        store: reads what the run has written; where it cannot, the API's word is all there is.
        console: takes what is shown.

    Raises:
        ApiError: there is no such run, or it was deleted, or who asks may not see it and no token file can change that.
    """
    run = connection.runs.run_service_get_run(run_id)
    spec = spec_of(connection, run)
    records = Records.of(run, spec, store)
    run, cancelled = _followed(connection, run, spec, records, console)
    if run.state == "SUCCEEDED":
        _show_success(records, console)
        return True
    _show_failure(connection, run, spec, records, console, cancelled=cancelled)
    return False


def spec_of(connection: Connection, run: Any) -> Spec:
    """The compiled pipeline of a run. Raises ApiError."""
    if run.pipeline_spec:
        return dict(run.pipeline_spec)
    reference = run.pipeline_version_reference
    found = connection.pipelines.pipeline_service_get_pipeline_version(reference.pipeline_id, reference.pipeline_version_id)
    return dict(found.pipeline_spec)


# --- While it runs --------------------------------------------------------------------------------------------------------


def _followed(connection: Connection, run: Any, spec: Spec, records: Records, console: Console) -> tuple[Any, bool]:
    """The run as it ended, and whether it was stopped: KFP calls most of these FAILED in the end."""
    board, told, cancelled = Board(records.num_rounds), "", False
    live = Live(console=console, transient=True) if console.is_terminal else contextlib.nullcontext()
    with live as display:
        while True:
            cancelled = cancelled or run.state in ("CANCELING", "CANCELED") or "CANCELING" in _history(run)
            if run.state in DONE:
                return run, cancelled
            told = _show(board, run, spec, records, console, display, told)
            time.sleep(EVERY)
            run = _asked(connection, run.run_id, console)


def _show(board: Board, run: Any, spec: Spec, records: Records, console: Console, display: Live | None, told: str) -> str:
    """Show where the run stands: in place on a terminal, else a line where it is another than the last, which is returned."""
    now, tasks = time.time(), tasks_of(run)
    trouble, finished = records.trouble, records.finished()
    if records.trouble and not trouble:
        console.print(f"The run's records cannot be read from here ({records.trouble}): what follows is KFP's word alone")
    line = board_line(steps(tasks, spec), tasks, finished=finished)
    if line is not None:
        board.update(line)
    seconds = now - run.created_at.timestamp()
    if display is not None:
        display.update(board.picture(seconds, now))
        return told
    sentence = {"PENDING": "waiting to start", "CANCELING": "being stopped"}.get(run.state) or board.sentence()
    if sentence != told:
        console.print(f"{sentence}  ({board.times(seconds, now)})")
    return sentence


def _asked(connection: Connection, run_id: str, console: Console) -> Any:
    """The run, once the API answers. Raises ApiError for what waiting does not mend."""
    silent_since = 0.0
    while True:
        try:
            run = connection.runs.run_service_get_run(run_id)
        except ApiError as error:
            if not error.passing or (error.status == 401 and not connection.renewable):
                raise
            if not silent_since:
                silent_since = time.monotonic()
                console.print(f"No word of the run, waiting: {error}")
            time.sleep(EVERY)
            continue
        if silent_since:
            console.print(f"The API answers again, after {clock(time.monotonic() - silent_since)}")
        return run


def tasks_of(run: Any) -> list[Any]:
    return list((run.run_details.task_details if run.run_details else None) or ())


def _history(run: Any) -> list[str]:
    return [str(status.state) for status in run.state_history or ()]


# --- At its end -----------------------------------------------------------------------------------------------------------


def _show_success(records: Records, console: Console) -> None:
    if not records.show_result(console):
        console.print(records.page(succeeded=True) or "The run has succeeded.")
    if records.trouble:
        console.print(f"Its results cannot be read from here: {records.trouble}")


def _show_failure(connection: Connection, run: Any, spec: Spec, records: Records, console: Console, *, cancelled: bool) -> None:
    step = failed_step(tasks_of(run), spec)
    console.print("The run was stopped by somebody" if cancelled else f"The run has ended as {run.state}")
    if step is not None:
        number = sum(each.stage == "begin" and each.start <= step.start for each in steps(tasks_of(run), spec))
        place = f" in round {number}" if number and step.stage not in ("evaluate", "promote", "report-outcome") else ""
        console.print(f"First step that {'was cut off' if cancelled else 'failed'}{place}: {step.title} ({step.name})")
        if words := last_words(connection, str(run.run_id), step):
            console.print("Its last lines:")
            for line in words:
                console.print(f"  {line}")
    page = records.page(succeeded=False)
    if page:
        console.print(page)
    else:
        console.print(
            f"Its records cannot be read from here ({records.trouble or 'there are none yet'}): see its steps' logs in the UI"
        )


def last_words(connection: Connection, run_id: str, step: Step) -> list[str]:
    """The last lines of a step's log, as far as the API server can still read its pod; none is no fault."""
    for pod in step.pods:
        with contextlib.suppress(ApiError):
            log = connection.get(LOG.format(run=run_id, pod=pod))
            if isinstance(log, str) and log.strip():  # a log that it cannot read is told as a JSON object
                return [line for line in log.splitlines() if line.strip()][-LAST_LINES:]
    return []
