"""What the pods of a training job say and die of. Reads Kubernetes' objects as they come, and asks for nothing but logs."""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from camopd.errors import CamopdError, WorkerError
from camopd.trainjob.cluster import Cluster, Object
from camopd.trainjob.spec import NODE, JobSpec

INDEX = "batch.kubernetes.io/job-completion-index"
TAIL = 20  # last lines of a node's log that are shown again when it fails
OVERLAP = 5  # seconds that two looks at a log share, against clocks that differ
KILLED = re.compile(r"exitcode\s*:\s*-9\b|Signal 9 \(SIGKILL\)")  # torchrun's words of a process whose memory ran out
STARTING = ("ContainerCreating", "PodInitializing")


@dataclass(frozen=True)
class Death:
    """The end of a node's container.

    Attributes:
        node: index of the node.
        exit_code: of the container; None where the pod was taken away as a whole.
        reason: Kubernetes' word, such as OOMKilled or Evicted.
        message: its sentence, where it has one.
        time: when, as Kubernetes writes it.
    """

    node: int
    exit_code: int | None
    reason: str
    message: str = ""
    time: str = ""


def condition(thing: Object, kind: str) -> Mapping[str, str]:
    """The job's or pod's condition of that kind when it is true, else nothing."""
    conditions = thing.get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == kind and each["status"] == "True"), {})


def node_of(pod: Object) -> int:
    """Which node a pod is; the label is there from Kubernetes 1.28 on, the annotation before."""
    metadata = pod["metadata"]
    return int(metadata.get("labels", {}).get(INDEX) or metadata.get("annotations", {}).get(INDEX) or 0)


def container_of(pod: Object) -> Object:
    """The status of the container that trains, empty before it has one; proxies beside it do not matter."""
    return next((each for each in pod.get("status", {}).get("containerStatuses", []) if each["name"] == NODE), {})


def deaths(pods: Iterable[Object]) -> dict[tuple[str, int], Death]:
    """Containers that ended badly, also those that were started again since, by pod and number of starts."""
    found = {}
    for pod in pods:
        status, node, uid = container_of(pod), node_of(pod), pod["metadata"]["uid"]
        restarts = status.get("restartCount", 0)
        for state, start in (("lastState", restarts - 1), ("state", restarts)):
            end = status.get(state, {}).get("terminated")
            if end and end["exitCode"]:
                found[uid, start] = Death(
                    node, end["exitCode"], end.get("reason", ""), end.get("message", ""), end.get("finishedAt") or ""
                )
        told = condition(pod, "DisruptionTarget")  # preempted, drained, or its node is gone
        if not told and pod["status"].get("phase") == "Failed":
            told = pod["status"]
        if told.get("reason"):
            found[uid, -1] = Death(node, None, told["reason"], told.get("message", ""))
    return found


def waiting(job: Object, pods: Sequence[Object], spec: JobSpec) -> str | None:
    """Why not all pods run, in Kubernetes' words; None when they do."""
    suspended = condition(job, "Suspended")
    if suspended:
        where = f"in Kueue's queue {spec.queue}" if spec.queue else "suspended"
        return f"{where} ({suspended.get('message', '')})"
    reasons = [f"node {node_of(pod)}: {reason}" for pod in sorted(pods, key=node_of) if (reason := _pending(pod))]
    missing = spec.nodes - len(pods)
    return "; ".join([*reasons, *([f"{missing} of {spec.nodes} pods are not made yet"] if missing > 0 else [])]) or None


def _pending(pod: Object) -> str:
    status = pod.get("status", {})
    if status.get("phase") != "Pending":
        return ""
    unscheduled = next(
        (c for c in status.get("conditions", []) if c["type"] == "PodScheduled" and c["status"] == "False"), None
    )
    if unscheduled:
        return f"{unscheduled.get('reason', '')}: {unscheduled.get('message', '')}"
    stuck = container_of(pod).get("state", {}).get("waiting", {})
    reason = stuck.get("reason", "is starting")
    return reason if reason in STARTING else f"{reason} {stuck.get('message', '')}".strip()


class Logs:
    """The logs of all nodes on standard output, each line once, with its node before it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._last: dict[str, str] = {}  # time of the last line, by pod
        self._asked: dict[str, float] = {}  # when the last answer was asked for
        self._starts: dict[str, int] = {}  # starts of the container whose log was read to its end
        self.tails: dict[int, deque[str]] = {}

    def show(self, pods: Iterable[Object]) -> None:
        """Print what the nodes have said since the last call. Raises ClusterError where logs must not be read."""
        for pod in sorted(pods, key=node_of):
            status, uid = container_of(pod), pod["metadata"]["uid"]
            restarts = status.get("restartCount", 0)
            if restarts > self._starts.get(uid, 0):  # what the ended container said last lies in another file
                self._starts[uid] = restarts
                self._read(pod, previous=True)
            if status.get("state", {}).keys() & {"running", "terminated"}:
                self._read(pod)

    def _read(self, pod: Object, *, previous: bool = False) -> None:
        uid, node, now = pod["metadata"]["uid"], node_of(pod), time.monotonic()
        since = None if previous or uid not in self._asked else int(now - self._asked[uid]) + OVERLAP
        lines = self._cluster.log(pod["metadata"]["name"], since=since, previous=previous)
        if lines is None:
            return
        self._asked[uid] = now
        for line in lines:
            stamp, _, text = line.partition(" ")  # kubelet writes nine digits of a second: as text in order
            if stamp > self._last.get(uid, ""):
                self._last[uid] = stamp
                self.tails.setdefault(node, deque(maxlen=TAIL)).append(text)
                print(f"[node {node}] {text}", flush=True)


# --- Why it failed --------------------------------------------------------------------------------------------------------


def cause(
    told: CamopdError | None,
    died: Sequence[Death],
    failed: Mapping[str, str],
    logs: Logs,
    spec: JobSpec,
    name: str,
) -> CamopdError:
    """What a failure is about. Who loses a neighbour fails as well, so a sentence of ours counts before memory that ran out,
    that before a pod that was taken away, and that before any other end; among ends the earliest.

    Args:
        told: the error that the training left (camopd.failures), if any.
        died: how containers ended.
        failed: the job's condition, empty where it was not waited for.
        logs: what the nodes said; the last lines of the one at fault go to standard error, since they may quote data.
        spec: of the job.
        name: of the job.
    """
    if told and not isinstance(told, WorkerError):  # which may be about a neighbour that is gone
        return told
    if failed.get("reason") == "DeadlineExceeded":
        what = f"TrainJob {name} took longer than training.timeout_minutes = {spec.timeout_minutes} of the pools file"
        return WorkerError(f"{what}; raise it and compile again")
    for death in died:
        if death.reason == "OOMKilled" or death.exit_code == 137 or _killed(logs.tails.get(death.node, ())):
            how = "OOMKilled" if death.reason == "OOMKilled" else "SIGKILL, exit code 137"
            return WorkerError(
                f"node {death.node} of {spec.nodes} was killed ({how}), as happens where memory runs out: give the training "
                "pool more memory or nodes, or lower train.batch_tokens"
            )
    first = min(died, key=_rank, default=None)
    if first is not None:
        for line in logs.tails.get(first.node, ()):
            print(f"[node {first.node}] {line}", file=sys.stderr)
    facts = [str(told)] if told else []
    if first is not None:
        end = f"exit code {first.exit_code}" if first.exit_code is not None else first.reason
        facts.append(f"node {first.node} of {spec.nodes} ended with {end}" + (f" ({first.message})" if first.message else ""))
    if failed:
        facts.append(f"{failed.get('reason', 'Failed')}: {failed.get('message', '')}")
    return WorkerError(f"TrainJob {name} failed: {'; '.join(facts)}; see the log of this step")


def _rank(death: Death) -> tuple[bool, bool, str]:
    """Pods that were taken away first, those that were ended because of another (143 is SIGTERM) last."""
    return death.exit_code is not None, death.exit_code == 143, death.time


def _killed(lines: Iterable[str]) -> bool:
    return any(KILLED.search(line) for line in lines)
