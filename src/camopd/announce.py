"""What the webhook (camopd.notify) is told of a run's end, by the pipeline's exit handler or by a process that does it all."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from camopd.errors import CamopdError
from camopd.notify import Message, send_once
from camopd.outcome import AGAIN, Ending, ending_of, reason_of
from camopd.store import Store

log = logging.getLogger(__name__)

_NEXT = {
    "promoted": "Load it as models:/{model_name}@{alias}.",
    "already-promoted": "Load it as models:/{model_name}@{alias}.",
    "refused": "Read the report; change the recipe or its gate, and start it again.",
    "superseded": "Compare the reports of both versions; the alias stays where it is until somebody moves it.",
    "alias-unverified": "Read the report; if the version is the better one, {approve}.",
    "candidate": "Read the report; then {approve}, or camopd reject.",
}


def message_of(ending: Ending, *, job: str = "") -> Message:
    """What the webhook is told of a run's end.

    Args:
        ending: how it ended.
        job: id of the pipeline run, if there is one.
    """
    known: dict[str, Any] = {
        "run": ending.run_uri.rpartition("/")[2] or "the recovery",
        "run_uri": ending.run_uri,
        "pipeline_run": job,
        "pipeline_url": os.environ.get("KFP_RUN_URL", ""),
    }
    if not ending.succeeded:
        return Message("failed", ending.title, reason=ending.lines["Reason"], next=ending.lines["Next"], **known)
    found = ending.result
    if found is None:
        return Message("success", ending.title, **known)
    known["report"], release = found.report, found.release
    if release is None:
        reason = "the gate said no: " + "; ".join(found.evaluation["decision"]["reasons"])
        return Message("refused", "was not promoted", reason=reason, next=_NEXT["refused"], **known)
    known |= {"model": release["model_name"], "version": release["version"], "alias": release["alias"]}
    approve = "camopd approve {model_name} --version {version} --by YOU --why TEXT".format(**release)
    known |= {"reason": "; ".join(release["reasons"])}
    known |= {"next": _NEXT.get(release["status"], "").format(**release, approve=approve)}
    if release["status"] in ("promoted", "already-promoted"):
        return Message("success", "was promoted", **known)
    if release["status"] == "candidate":
        known["reason"] = "; ".join(found.evaluation["decision"]["reasons"])
        return Message("waiting", "passed the gate and waits for an approval", **known)
    if release["status"] == "disabled":
        return Message("success", "passed the gate; nothing is registered", **known)
    return Message("refused", "was not promoted", **known)


def tell(ending: Ending, *, store: Store, job: str = "") -> None:
    """Send the message of a run's end, once. Whatever goes wrong is a line in the log."""
    if ending.quiet:
        return
    try:
        send_once(message_of(ending, job=job), ending.run_uri or ending.place, ending.moment, store)
    except Exception as error:  # the run is over: its own outcome is what counts
        log.warning("the webhook was not told (%s)", type(error).__name__)


@contextlib.contextmanager
def telling(store: Store) -> Iterator[dict[str, str]]:
    """Tell the end of a run in this process, well or not; but for Ctrl-C, whose sender knows.

    Gives a record to fill with ``run``, the run's prefix, once it is known.
    """
    record: dict[str, str] = {}
    try:
        yield record
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        tell(_ending_here(record.get("run", ""), error, store), store=store)
        raise
    tell(_ending_here(record["run"], None, store), store=store)


def _ending_here(run_uri: str, error: BaseException | None, store: Store) -> Ending:
    """How a run of this process ended: ``error`` is what it met."""
    if not run_uri:
        assert error is not None, "a run that ended well has a place"
        lines = {"Reason": reason_of(error), "Next": "Mend what is named and start it again; nothing was spent."}
        return Ending("failed in prepare", lines, succeeded=False)
    try:
        return ending_of(run_uri, succeeded=error is None, store=store)
    except (CamopdError, OSError) as problem:  # what failed may be the store itself
        return Ending("failed", {"Reason": reason_of(error or problem), "Next": AGAIN}, succeeded=False, run_uri=run_uri)
