"""The TrainJob of a round: field by field, and as the schemas of Kubeflow Trainer take it."""

import copy
import json
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from camopd.trainjob import JobSpec, job_name, render
from tests.fixtures.kubernetes_api import SCHEMAS
from tests.fixtures.structural import problems

ROUND = "s3://bucket/runs/medical-8b-0123456789ab/rounds/0007"
SMALL = JobSpec(nodes=2, runtime="torch-distributed", image="ghcr.io/camopd/trainer:1")
FULL = JobSpec(
    nodes=4,
    runtime="camopd",
    runtime_kind="TrainingRuntime",
    image="ghcr.io/camopd/trainer@sha256:00",
    image_pull_secrets=("registry", "mirror"),
    accelerator="nvidia.com/gpu",
    count=8,
    cpu="64",
    memory="512Gi",
    shm="64Gi",
    scratch="1Ti",
    resources={"rdma/ib": "8"},
    selectors={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    tolerations=({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},),
    service_account="camopd-nodes",
    queue="gpu-queue",
    priority_class="nightly",
    labels={"team": "nlp"},
    node_affinity={
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
        }
    },
    env={"NCCL_DEBUG": "WARN", "AWS_ENDPOINT_URL_S3": "https://s3.example"},
    secrets={"AWS_SECRET_ACCESS_KEY": "camopd-s3/secret-key", "AWS_ACCESS_KEY_ID": "camopd-s3/access-key"},
    ca_bundle="company-ca/ca.crt",
    timeout_minutes=90,
)


def pod_template(job: dict[str, Any]) -> dict[str, Any]:
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert node["name"] == "node"
    return node["template"]["spec"]["template"]


# --- The object -----------------------------------------------------------------------------------------------------------


def test_who_it_is_and_whose():
    job = render(FULL, ROUND, owner={"name": "train-pod", "uid": "u-1"})
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"] == {
        "name": job_name(ROUND),
        "labels": {
            "app.kubernetes.io/managed-by": "camopd",
            "kueue.x-k8s.io/queue-name": "gpu-queue",
            "kueue.x-k8s.io/priority-class": "nightly",
        },
        "annotations": {"camopd.io/run": "s3://bucket/runs/medical-8b-0123456789ab", "camopd.io/round": "7"},
        "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "train-pod", "uid": "u-1"}],
    }
    assert "ownerReferences" not in render(FULL, ROUND)["metadata"]


def test_what_each_node_runs():
    spec = render(FULL, ROUND)["spec"]
    assert spec["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "camopd"}
    trainer = spec["trainer"]
    assert [*trainer["command"], *trainer["args"]] == ["torchrun", "-m", "camopd.train", ROUND]
    assert trainer["image"] == "ghcr.io/camopd/trainer@sha256:00"
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert spec["activeDeadlineSeconds"] == 5400
    assert set(spec) == {"runtimeRef", "trainer", "runtimePatches", "activeDeadlineSeconds"}


def test_what_each_pod_asks_for():
    limits = {"nvidia.com/gpu": "8", "rdma/ib": "8", "memory": "512Gi"}
    assert render(FULL, ROUND)["spec"]["trainer"]["resourcesPerNode"] == {"requests": {**limits, "cpu": "64"}, "limits": limits}


def test_secrets_are_references_and_never_values():
    job = render(FULL, ROUND)["spec"]["trainer"]
    assert [entry for entry in job["env"] if entry.get("value") != "/etc/camopd-ca/ca.crt"] == [
        {"name": "AWS_ENDPOINT_URL_S3", "value": "https://s3.example"},
        {"name": "NCCL_DEBUG", "value": "WARN"},
        {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "camopd-s3", "key": "access-key"}}},
        {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "camopd-s3", "key": "secret-key"}}},
    ]


def test_a_bundle_of_certificates_is_named_to_all_that_open_connections():
    env = {entry["name"]: entry.get("value") for entry in render(FULL, ROUND)["spec"]["trainer"]["env"]}
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        assert env[name] == "/etc/camopd-ca/ca.crt"


def test_where_the_pods_run():
    job = render(FULL, ROUND)
    assert job["spec"]["runtimePatches"][0]["manager"] == "camopd.io/pools"  # Trainer wants a prefix of a domain
    assert pod_template(job) == {
        "metadata": {"labels": {"team": "nlp", "app.kubernetes.io/managed-by": "camopd", "sidecar.istio.io/inject": "false"}},
        "spec": {
            "serviceAccountName": "camopd-nodes",
            "imagePullSecrets": [{"name": "registry"}, {"name": "mirror"}],
            "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
            "affinity": {"nodeAffinity": FULL.node_affinity},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "volumes": [
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
                {"name": "scratch", "emptyDir": {"sizeLimit": "1Ti"}},
                {"name": "ca", "configMap": {"name": "company-ca"}},
            ],
            "containers": [
                {
                    "name": "node",
                    "volumeMounts": [
                        {"name": "shm", "mountPath": "/dev/shm"},
                        {"name": "scratch", "mountPath": "/tmp"},
                        {"name": "ca", "mountPath": "/etc/camopd-ca"},
                    ],
                }
            ],
        },
    }


def test_what_is_not_asked_for_is_not_there():
    job = render(SMALL, ROUND)
    assert set(job["metadata"]) == {"name", "labels", "annotations"}
    assert set(job["metadata"]["labels"]) == {"app.kubernetes.io/managed-by"}
    trainer = job["spec"]["trainer"]
    assert (trainer["numProcPerNode"], trainer["env"], trainer["resourcesPerNode"]) == (1, [], {})
    assert "activeDeadlineSeconds" not in job["spec"]
    assert set(pod_template(job)) == {"metadata"}


def test_the_description_survives_the_compiled_file():
    assert JobSpec.model_validate_json(FULL.model_dump_json(exclude_defaults=True)) == FULL


def test_kubernetes_client_is_loaded_by_those_who_ask_a_cluster_alone():
    code = "import sys, camopd.workflow, camopd.trainjob; sys.exit('kubernetes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Its name -------------------------------------------------------------------------------------------------------------


def test_a_name_says_run_and_round_and_is_the_same_for_every_attempt():
    assert re.fullmatch(r"camopd-medical-8b-01234-r0007-[0-9a-f]{12}", job_name(ROUND))
    assert job_name(ROUND) == job_name(ROUND)


def test_no_two_rounds_share_a_name():
    places = [
        f"{output}/{run}/rounds/{number:04d}"
        for output in ("s3://a", "s3://b")
        for run in ("x", "X", "x-")
        for number in (1, 2)
    ]
    assert len({job_name(place) for place in places}) == len(places)


@pytest.mark.parametrize("run", ["Ünder_Score..-", "医療-8b", "--", "a" * 300, "9"])
def test_a_name_is_a_label_with_room_for_what_jobset_appends(run):
    name = job_name(f"/runs/{run}/rounds/12345")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert "--" not in name
    assert len(f"{name}-node-0-998-abcde") <= 63


# --- The schema -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SCHEMAS)
def schema(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(SCHEMAS[request.param].read_text(encoding="utf-8"))


@pytest.mark.parametrize("spec", [SMALL, FULL], ids=["small", "full"])
def test_both_versions_of_trainer_take_the_object(schema, spec):
    job = render(spec, ROUND, owner={"name": "train-pod", "uid": "u-1"})
    assert list(problems(job, schema)) == []
    assert json.loads(json.dumps(job)) == job


BROKEN = {
    "numNodes: must be integer": lambda spec: spec["trainer"].update(numNodes="4"),
    "numProcPerNode: must be integer": lambda spec: spec["trainer"].update(numProcPerNode=1.5),
    "activeDeadlineSeconds: is out of bounds": lambda spec: spec.update(activeDeadlineSeconds=0),
    'unknown field "spec.podTemplateOverrides"': lambda spec: spec.update(podTemplateOverrides=[]),
    'unknown field "spec.trainer.envFrom"': lambda spec: spec["trainer"].update(envFrom=[]),
    "runtimeRef.name: is missing": lambda spec: spec["runtimeRef"].pop("name"),
    "key: is missing": lambda spec: spec["trainer"]["env"][-1]["valueFrom"]["secretKeyRef"].pop("key"),
    "does not match": lambda spec: spec["trainer"]["resourcesPerNode"]["limits"].update(memory="lots"),
    "manager: has a wrong length": lambda spec: spec["runtimePatches"][0].update(manager=""),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_the_schema_sees_what_is_wrong(schema, sentence):
    job = copy.deepcopy(render(FULL, ROUND))
    BROKEN[sentence](job["spec"])
    (found,) = problems(job, schema)
    assert sentence in found
