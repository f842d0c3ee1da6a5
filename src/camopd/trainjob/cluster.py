"""The few questions that a training job has for Kubernetes, each answered or refused in a sentence. Imports the client lazily.

A passing fault (a broken connection, a server that is busy or restarts) is waited out; everything else is a ClusterError that
names what was asked, by whom and where.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from camopd.errors import ClusterError
from camopd.trainjob.spec import API_GROUP, API_VERSION, NODE, PLURAL

PATIENCE = 300.0  # seconds without an answer: longer than a control plane takes to restart
PAUSE = 1.0  # seconds before a question is asked again; doubled each time
TIMEOUT = 20  # seconds for one answer
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
RBAC = re.compile(r'User "(?P<user>[^"]+)" cannot (?P<verb>\w+) resource')

Object = Mapping[str, Any]


class Cluster:
    """Kubernetes as one service account sees one namespace.

    Args:
        api: the client package's ``ApiClient``.
        namespace: where jobs are made: the one of the step that launches them.
    """

    def __init__(self, api: Any, namespace: str) -> None:
        from kubernetes import client

        self.namespace = namespace
        self._jobs, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._place: dict[str, Any] = {"group": API_GROUP, "version": API_VERSION, "namespace": namespace, "plural": PLURAL}

    @classmethod
    def connect(cls) -> Cluster:
        """From inside a pod by its service account, else by the kubeconfig. Raises ClusterError where there is neither."""
        from kubernetes import client, config

        configuration = client.Configuration()
        configuration.retries = False  # ours know what may be asked twice
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=configuration)
                namespace = NAMESPACE.read_text(encoding="utf-8").strip()
            else:
                file = os.environ.get("KUBECONFIG")  # the client looks at it once, when it is imported
                config.load_kube_config(config_file=file, client_configuration=configuration)
                context = config.list_kube_config_contexts(config_file=file)[1]["context"]
                namespace = context.get("namespace", "default")
        except (config.ConfigException, OSError) as error:
            raise ClusterError(
                f"no way to Kubernetes: {error}; train on several nodes from inside a cluster, or with a kubeconfig"
            ) from None
        return cls(client.ApiClient(configuration), namespace)

    # --- Training jobs --------------------------------------------------------------------------------------------------------

    def job(self, name: str) -> Object | None:
        """The TrainJob of that name, or None."""
        return self._ask("get", PLURAL, self._jobs.get_namespaced_custom_object, **self._place, name=name)

    def create(self, body: Object) -> bool:
        """Make a TrainJob, every field of it or none at all. False when there is one of that name."""

        def call(**options: Any) -> bool:
            from kubernetes.client import ApiException

            try:
                self._jobs.create_namespaced_custom_object(**options)
            except ApiException as error:
                if error.status == 409:
                    return False
                raise
            return True

        made = self._ask("create", PLURAL, call, **self._place, body=body, field_validation="Strict")
        if made is None:
            raise ClusterError(f"there is no namespace {self.namespace}")
        return bool(made)

    def delete(self, name: str, *, patience: float | None = None, timeout: int = TIMEOUT) -> bool:
        """Delete a TrainJob after its pods; returns at once, before they are gone. False when there is none."""
        options = self._place | {"name": name, "propagation_policy": "Foreground"}
        call = self._jobs.delete_namespaced_custom_object
        return self._ask("delete", PLURAL, call, patience=patience, timeout=timeout, **options) is not None

    # --- Their pods -----------------------------------------------------------------------------------------------------------

    def pods(self, name: str) -> Sequence[Object]:
        """The pods that train, of the JobSet that Trainer makes by the job's name."""
        selector = f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/replicatedjob-name={NODE}"
        return self._list("pods", self._core.list_namespaced_pod, label_selector=selector)

    def log(self, pod: str, *, since: int | None = None, previous: bool = False) -> list[str] | None:
        """Lines of a pod's log, each with its time before it; None where there is none to be had now.

        Args:
            pod: name of the pod.
            since: seconds to look back; none means all of it.
            previous: of the container before it was restarted.
        """
        from urllib3.exceptions import HTTPError

        options: dict[str, Any] = {"name": pod, "namespace": self.namespace, "container": NODE, "timestamps": True}
        options |= {"previous": previous, "patience": 0, "_preload_content": False} | (
            {"since_seconds": since} if since else {}
        )
        try:
            response = self._ask("get", "pods/log", self._core.read_namespaced_pod_log, **options)
            return response.data.decode("utf-8", errors="replace").splitlines() if response is not None else None
        except ForbiddenError:
            raise
        except (ClusterError, HTTPError):  # it has not started, its node is lost, or the connection broke: asked again
            return None

    def warnings(self, name: str) -> list[str]:
        """What Kubernetes warns of about the TrainJob itself, the latest last."""
        selector = f"involvedObject.name={name},type=Warning"
        events = self._list("events", self._core.list_namespaced_event, field_selector=selector)
        return [event["message"] for event in sorted(events, key=lambda event: event.get("lastTimestamp") or "")]

    # --- Asking ---------------------------------------------------------------------------------------------------------------

    def _list(self, resource: str, call: Callable[..., Any], **options: Any) -> Sequence[Object]:
        def read(**options: Any) -> Sequence[Object]:
            return json.loads(call(**options, _preload_content=False).data)["items"]

        return self._ask("list", resource, read, namespace=self.namespace, **options) or []

    def _ask(
        self,
        verb: str,
        resource: str,
        call: Callable[..., Any],
        *,
        patience: float | None = None,
        timeout: int = TIMEOUT,
        **options: Any,
    ) -> Any:
        """The answer, or None when the object is not there. Raises ClusterError."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        patience = PATIENCE if patience is None else patience
        until, pause = time.monotonic() + patience, PAUSE
        while True:
            try:
                return call(**options, _request_timeout=timeout)
            except (ApiException, HTTPError) as error:
                status = error.status if isinstance(error, ApiException) else None
                told = _told(error)
                if status == 404 and told.get("details", {}).get("name"):
                    return None
                if status is not None and status != 429 and status < 500:
                    raise refusal(status, told, verb=verb, resource=resource, namespace=self.namespace) from None
                if time.monotonic() + pause > until:
                    what = told.get("message") or type(error).__name__
                    raise ClusterError(
                        f"Kubernetes gave no answer to {verb} {resource} for {patience:.0f} s ({what}). A job that runs "
                        "goes on: start this step again to follow it"
                    ) from None
            time.sleep(pause)
            pause = min(pause * 2, 15.0)


class ForbiddenError(ClusterError):
    """A right is missing."""


def refusal(status: int, told: Object, *, verb: str, resource: str, namespace: str) -> ClusterError:
    """A refusal of the API server in words that say what to do.

    Args:
        status: of HTTP.
        told: the Status object of the answer, empty where there was none.
        verb: what was asked.
        resource: of which kind of object.
        namespace: where.
    """
    message = str(told.get("message", ""))
    if status == 403 and (found := RBAC.search(message)):
        _, _, account = found["user"].rpartition(":")
        return ForbiddenError(
            f"the service account {account} may not {verb} {resource} in namespace {namespace}; give it the Role of "
            "docs/scale.md, Several nodes"
        )
    if status == 404:
        return ClusterError(
            f"the cluster knows no TrainJob of {API_GROUP}/{API_VERSION}: install Kubeflow Trainer 2.2 or later, or set "
            "nodes = 1 in the pools file"
        )
    if status == 400 and "unknown field" in message:
        return ClusterError(
            f"the cluster's Kubeflow Trainer is another than ours, 2.2 or 2.3, and does not know every field: {message}"
        )
    if status == 401:
        return ClusterError(
            "Kubernetes does not know who asks: the service account's token or the kubeconfig is no longer valid"
        )
    return ClusterError(f"Kubernetes refused to {verb} {resource} in namespace {namespace} ({status}): {message}")


def _told(error: Exception) -> dict[str, Any]:
    """The Status object that an API server answers with; proxies and missing API groups answer plain text."""
    try:
        told = json.loads(getattr(error, "body", None) or "")
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
