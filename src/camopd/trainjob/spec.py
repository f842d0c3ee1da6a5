"""What a training job on several nodes looks like: a TrainJob of Kubeflow Trainer, ``trainer.kubeflow.org/v1alpha1``.

The object is the one of Trainer 2.2 and 2.3. Earlier versions say ``podSpecOverrides`` (2.0) or ``podTemplateOverrides`` (2.1)
where these say ``runtimePatches``; their API servers refuse ours, since it is sent with strict validation of fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from camopd import plan as layout
from camopd.store import digest

API_GROUP, API_VERSION, PLURAL, KIND = "trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob"
NODE = "node"  # the replicated job that trains and its container, in every runtime for torch that Trainer ships
MANAGED_BY = {"app.kubernetes.io/managed-by": "camopd"}
CA_FOLDER = "/etc/camopd-ca"
SERVES = "camopd.io"  # prefix of our annotations, and the manager of our patches
RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")  # set by the runtime


class JobSpec(BaseModel):
    """What the platform's engineer decides of a job; ``pipelines.pools`` checks it and writes it into the compiled file.

    Attributes:
        nodes: pods that train together.
        runtime: name of the TrainingRuntime or ClusterTrainingRuntime.
        runtime_kind: which of the two.
        image: image of the pods.
        image_pull_secrets: Secrets with the registry's credentials, beside the runtime's.
        accelerator: resource name, such as nvidia.com/gpu.
        count: accelerators of a pod, and processes of it; without accelerators one process.
        cpu: cores requested.
        memory: memory requested, and the limit.
        shm: size of /dev/shm.
        scratch: size of the disk at /tmp, where models are downloaded.
        resources: other resources of a pod, such as network cards.
        selectors: node labels that must match.
        node_affinity: in Kubernetes' fields.
        tolerations: taints that are accepted, in Kubernetes' fields.
        labels: of the pods.
        service_account: of the pods; none is the runtime's.
        queue: Kueue's local queue.
        priority_class: Kueue's WorkloadPriorityClass in that queue.
        env: variables of the pods.
        secrets: variables whose value is ``name/key`` of a Secret.
        ca_bundle: ``name/key`` of a ConfigMap with the certificates to trust.
        timeout_minutes: longest time of a job, not counting the time in a queue.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: int
    runtime: str
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    image: str
    image_pull_secrets: tuple[str, ...] = ()
    accelerator: str | None = None
    count: int = 0
    cpu: str | None = None
    memory: str | None = None
    shm: str | None = None
    scratch: str | None = None
    resources: Mapping[str, str] = {}
    selectors: Mapping[str, str] = {}
    node_affinity: Mapping[str, Any] = {}
    tolerations: tuple[Mapping[str, str], ...] = ()
    labels: Mapping[str, str] = {}
    service_account: str | None = None
    queue: str | None = None
    priority_class: str | None = None
    env: Mapping[str, str] = {}
    secrets: Mapping[str, str] = {}
    ca_bundle: str | None = None
    timeout_minutes: int | None = None


def kueue_labels(queue: str | None, priority_class: str | None) -> dict[str, str]:
    """What puts an object into Kueue's local queue, at a priority there; nothing without a queue."""
    named = {"queue-name": queue, "priority-class": priority_class}
    return {f"kueue.x-k8s.io/{name}": value for name, value in named.items() if value}


def trusting(ca_bundle: str | None, secrets: Mapping[str, str]) -> dict[str, str]:
    """The variables by which boto3, requests, and OpenSSL or Go find the bundle, but for those that a Secret says."""
    if ca_bundle is None:
        return {}
    path = f"{CA_FOLDER}/{ca_bundle.rpartition('/')[2]}"
    return {name: path for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE") if name not in secrets}


def job_name(round_uri: str) -> str:
    """``camopd-medical-r0007-5a0b1c2d3e4f``: the same for every attempt at a round, another for any other round.

    At most 43 characters: JobSet appends ``-node-0-<node>`` and five letters of the pod, and all of it is to be a DNS label.
    """
    run_uri, number = layout.run_and_round(round_uri)
    words = re.sub(r"[^a-z0-9]+", "-", run_uri.rpartition("/")[2].lower()).strip("-")[:16].strip("-") or "run"
    return f"camopd-{words}-r{number:04d}-{digest(round_uri).removeprefix('sha256:')[:12]}"


def render(spec: JobSpec, round_uri: str, *, owner: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The TrainJob of a round, as ``trainer.kubeflow.org/v1alpha1`` of Kubeflow Trainer 2.2 and 2.3 takes it.

    Every pod runs ``torchrun`` without an argument on who it is: the runtime's torch policy says so in PET_* variables. No
    value of a secret is in the object.

    Args:
        spec: what the pods ask for.
        round_uri: ``<run>/rounds/0001``, rolled out, scored and selected.
        owner: ``name`` and ``uid`` of the pod that launches: whoever deletes it deletes the job.
    """
    run_uri, number = layout.run_and_round(round_uri)
    metadata: dict[str, Any] = {
        "name": job_name(round_uri),
        "labels": MANAGED_BY | kueue_labels(spec.queue, spec.priority_class),
        "annotations": {f"{SERVES}/run": run_uri, f"{SERVES}/round": str(number)},
    }
    if owner:
        metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", **owner}]
    body: dict[str, Any] = {
        "runtimeRef": {"apiGroup": API_GROUP, "kind": spec.runtime_kind, "name": spec.runtime},
        "trainer": {
            "image": spec.image,
            "command": ["torchrun"],
            "args": ["-m", "camopd.train", round_uri],
            "env": _environment(spec),
            "numNodes": spec.nodes,
            "numProcPerNode": max(spec.count, 1),
            "resourcesPerNode": _resources(spec),
        },
        "runtimePatches": [_patch(spec)],
    }
    if spec.timeout_minutes:
        body["activeDeadlineSeconds"] = spec.timeout_minutes * 60
    return {"apiVersion": f"{API_GROUP}/{API_VERSION}", "kind": KIND, "metadata": metadata, "spec": body}


def _environment(spec: JobSpec) -> list[dict[str, Any]]:
    env = trusting(spec.ca_bundle, spec.secrets) | dict(spec.env)
    plain = [{"name": name, "value": value} for name, value in sorted(env.items())]
    references = [(name, *place.split("/")) for name, place in sorted(spec.secrets.items())]
    return plain + [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}} for name, secret, key in references
    ]


def _resources(spec: JobSpec) -> dict[str, Any]:
    """Extended resources have no request apart from their limit; memory's limit is its request: no pod lives on luck."""
    limits = dict(spec.resources)
    if spec.accelerator:
        limits[spec.accelerator] = str(spec.count)
    if spec.memory:
        limits["memory"] = spec.memory
    requests = limits | ({"cpu": spec.cpu} if spec.cpu else {})
    return {name: values for name, values in (("requests", requests), ("limits", limits)) if values}


def _patch(spec: JobSpec) -> dict[str, Any]:
    """What of the pods is not the trainer's own: where they run, their shared memory, their labels."""
    pod: dict[str, Any] = {}
    if spec.service_account:
        pod["serviceAccountName"] = spec.service_account
    if spec.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in spec.image_pull_secrets]
    if spec.selectors:
        pod["nodeSelector"] = dict(spec.selectors)
    if spec.node_affinity:
        pod["affinity"] = {"nodeAffinity": dict(spec.node_affinity)}
    if spec.tolerations:
        pod["tolerations"] = [dict(toleration) for toleration in spec.tolerations]
    if volumes := _volumes(spec):
        pod["volumes"] = [{"name": name, **kind} for name, _, kind in volumes]
        pod["containers"] = [{"name": NODE, "volumeMounts": [{"name": name, "mountPath": at} for name, at, _ in volumes]}]
    # Istio's proxy neither lets the nodes meet nor ends when they do.
    labels = {**spec.labels, **MANAGED_BY, "sidecar.istio.io/inject": "false"}
    template: dict[str, Any] = {"metadata": {"labels": labels}}
    if pod:
        template["spec"] = pod
    job = {"name": NODE, "template": {"spec": {"template": template}}}
    return {"manager": f"{SERVES}/pools", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}


def _volumes(spec: JobSpec) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, place and kind of what is mounted."""
    volumes: list[tuple[str, str, dict[str, Any]]] = []
    if spec.shm:
        volumes.append(("shm", "/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": spec.shm}}))
    if spec.scratch:
        volumes.append(("scratch", "/tmp", {"emptyDir": {"sizeLimit": spec.scratch}}))
    if spec.ca_bundle:
        volumes.append(("ca", CA_FOLDER, {"configMap": {"name": spec.ca_bundle.split("/")[0]}}))
    return volumes
