"""Launch a round's TrainJob, or take up the one of an earlier attempt; follow it to its end, and say why when it fails.

There is no watch to be lost: one job is asked for every two seconds, and so are its pods and their logs from the last line on.
A broken connection costs a look and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence

from camopd import plan as layout
from camopd.attempts import heeding_sigterm
from camopd.errors import ClusterError
from camopd.failures import failure_of, forget_failure
from camopd.store import Manifest, Store
from camopd.trainjob.cluster import Cluster, Object
from camopd.trainjob.pods import Death, Logs, cause, condition, deaths, waiting
from camopd.trainjob.spec import JobSpec, job_name, render

POLL = 2.0  # seconds between two looks at the job
PENDING = 60.0  # seconds after which pods that do not start are asked why
REPEAT = 600.0  # seconds after which the same answer is worth another line
GRACE = 15.0  # seconds after the first pod's death in which the others may say why
GONE = 600.0  # seconds that a deleted job may take to go: its pods have their time to end


def launch_and_follow(
    job: str, round_uri: str, *, store: Store, cluster: Cluster | None = None, poll: float = POLL
) -> Manifest:
    """Have a round's updates done by a TrainJob and return the checkpoint's manifest, which the job's pods write.

    A job of an earlier attempt that still runs is followed; one that failed or is being deleted makes way for a new one.
    SIGTERM and Ctrl-C delete the job. A failed one stays to be looked at until the next attempt, one that is done is deleted.

    Args:
        job: a JobSpec as JSON.
        round_uri: ``<run>/rounds/0001``, rolled out, scored and selected.
        store: where the pods write.
        cluster: what to ask; none means the one that this process runs in, or the kubeconfig's.
        poll: seconds between two looks.

    Raises:
        ClusterError: a right, Kubeflow Trainer or an answer is missing.
        CamopdError: the training's own error, in its class; WorkerError when a pod died.
        SystemExit: SIGTERM came; the job is deleted.
    """
    spec, uri = JobSpec.model_validate_json(job), layout.checkpoint_uri(round_uri)
    manifest = store.manifest(uri)
    if manifest is not None:
        return manifest
    launch = Launch(cluster or Cluster.connect(), spec, round_uri, store, poll)
    with heeding_sigterm():
        try:
            launch.start()
            launch.follow()
        except (SystemExit, KeyboardInterrupt):
            launch.cancel()
            raise
    manifest = store.require(uri)
    launch.tidy()
    return manifest


class Launch:
    """One attempt at a round's TrainJob."""

    def __init__(self, cluster: Cluster, spec: JobSpec, round_uri: str, store: Store, poll: float) -> None:
        self.name = job_name(round_uri)
        self._cluster, self._spec, self._round_uri, self._store, self._poll = cluster, spec, round_uri, store, poll
        self._logs = Logs(cluster)
        self._deaths: dict[tuple[str, int], Death] = {}
        self._said, self._said_at, self._begun = "", 0.0, time.monotonic()

    # --- Beginning and end ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the job, or find the one of an earlier attempt at work or done."""
        while True:
            job = self._cluster.job(self.name)
            if job is None:
                forget_failure(self._round_uri, self._store)
                if self._cluster.create(render(self._spec, self._round_uri, owner=_owner())):
                    _say(f"TrainJob {self.name}: launched in namespace {self._cluster.namespace}, {self._spec.nodes} nodes")
                    return
                time.sleep(self._poll)
                continue
            leaves = job["metadata"].get("deletionTimestamp")
            done = condition(job, "Complete") and self._store.manifest(layout.checkpoint_uri(self._round_uri)) is not None
            if not leaves and (done or not (condition(job, "Complete") or condition(job, "Failed"))):
                _say(f"TrainJob {self.name}: an earlier attempt launched it; following it")
                return
            _say(f"TrainJob {self.name}: an earlier attempt's, and without a checkpoint; waiting until it is gone")
            if not leaves:
                self._cluster.delete(self.name)
            self._wait_gone(job["metadata"]["uid"])

    def _wait_gone(self, uid: str) -> None:
        until = time.monotonic() + GONE
        while (job := self._cluster.job(self.name)) is not None and job["metadata"]["uid"] == uid:
            if time.monotonic() > until:
                raise ClusterError(
                    f"TrainJob {self.name} in namespace {self._cluster.namespace} is deleted, and not gone after {GONE:.0f} s: "
                    "see its finalizers and the nodes of its pods, and start again"
                )
            time.sleep(self._poll)

    def cancel(self) -> None:
        """Delete the job, in the seconds that are left. One whose making was still under way may come into being meanwhile."""
        _say(f"TrainJob {self.name}: cancelled; deleting it")
        for _ in range(3):
            try:
                if self._cluster.delete(self.name, patience=4, timeout=2):
                    return
            except ClusterError as error:
                _say(f"TrainJob {self.name} may still run: {error}. kubectl delete trainjob {self.name}")
                return
            time.sleep(0.5)

    def tidy(self) -> None:
        """Delete the finished job: what remains of it is in the store."""
        try:
            self._cluster.delete(self.name, patience=20)
        except ClusterError as error:
            _say(f"TrainJob {self.name} is done and was not deleted: {error}")

    # --- Between --------------------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Show what the pods say until the job is done. Raises CamopdError when it is not going to be."""
        died_at: float | None = None
        while True:
            job = self._cluster.job(self.name)
            if job is None or job["metadata"].get("deletionTimestamp"):
                raise ClusterError(
                    f"TrainJob {self.name} was deleted while it ran, not by this step; start again to train the round"
                )
            pods = self._cluster.pods(self.name)
            self._logs.show(pods)
            if condition(job, "Complete"):
                return
            self._deaths |= deaths(pods)
            if self._deaths and died_at is None:
                died_at = time.monotonic()
            if condition(job, "Failed") or (died_at is not None and time.monotonic() - died_at > GRACE):
                self._fail(job)
            self._tell_why_nothing_runs(job, pods)
            time.sleep(self._poll)

    def _fail(self, job: Object) -> None:
        """Raise why. A job that would start its pods again is deleted: no node can join the others once they have begun."""
        failed = condition(job, "Failed")
        if not failed:
            self._cluster.delete(self.name)
        told = failure_of(self._round_uri, self._store)
        raise cause(told, list(self._deaths.values()), failed, self._logs, self._spec, self.name)

    def _tell_why_nothing_runs(self, job: Object, pods: Sequence[Object]) -> None:
        """One line when it has taken long, another when the reason changes; the same one rarely."""
        now = time.monotonic()
        why = waiting(job, pods, self._spec)
        if why is None:
            self._begun = now
            return
        if now - self._begun < PENDING or (why == self._said and now - self._said_at < REPEAT):
            return
        self._said, self._said_at = why, now
        warnings: list[str] = []
        if not pods:
            with contextlib.suppress(ClusterError):  # to read events is not worth failing for
                warnings = self._cluster.warnings(self.name)
        _say("; ".join([f"TrainJob {self.name} waits: {why}", *warnings[-1:]]))


def _owner() -> Mapping[str, str] | None:
    """The pod of this step, by the variables that KFP gives it."""
    names = {"name": os.environ.get("KFP_POD_NAME", ""), "uid": os.environ.get("KFP_POD_UID", "")}
    return names if all(names.values()) else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
