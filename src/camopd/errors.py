"""What goes wrong, said once and so that the reader knows what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input.

    Attributes:
        where: the parameter (``branches.general.teacher``) or the file and physical line (``prompts.jsonl:12``).
        what: what is wrong there. Never the text of a prompt: messages end up in logs.
        fix: what the reader should do.
    """

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" -> {self.fix}" if self.fix else "")


class CamopdError(Exception):
    """Base of the errors that are for people: the command line prints the message without a traceback."""


class InputError(CamopdError, ValueError):
    """Bad input: every problem found, at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = [f"{count} problem{'s' if count != 1 else ''} found, nothing was started:"]
        super().__init__("\n".join(lines + [f"  {i}. {p}" for i, p in enumerate(self.problems, 1)]))


class StoreError(CamopdError):
    """A file or object that is missing, short, changed or not permitted."""


class MissingError(StoreError):
    """A file or prefix that was asked for is not there."""


class DamagedError(StoreError):
    """Files that are not what their manifest says."""


class RefusedError(CamopdError):
    """What was asked of the registry does not fit what is there; nothing was changed."""


class UnhealthyRunError(CamopdError):
    """The run stopped itself: stale weights, exploding length, non-finite loss, empty rollouts."""


class WorkerError(CamopdError):
    """One of several processes of a stage died, or met a fault that no sentence of ours tells of."""


class EngineError(CamopdError):
    """What samples and scores does not start, or died, or was asked for what it cannot do."""


class ScheduleError(CamopdError):
    """A schedule has tried a model as often as it may."""


class ClusterError(CamopdError):
    """Kubernetes refused, did not answer, or lacks what a job on several nodes needs."""


class TrackingError(CamopdError):
    """The MLflow server could not be reached or refused, where its answer is needed."""
