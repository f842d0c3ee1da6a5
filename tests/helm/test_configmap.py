"""The file of `camopd sync` that the chart writes: what the values say, in the words of the pools file."""

import json
import re
from typing import Any

import pytest
import yaml

from camopd import __version__
from camopd.trainjob import JobSpec
from pipelines.compile import compile_pipeline
from pipelines.pools import Pools, check_pools
from tests.helm.conftest import NAMED, Helm, one

DIGESTS = {
    name: f"mirror.example/x/camopd/{name}@sha256:{letter * 64}"
    for name, letter in (("core", "a"), ("trainer", "b"), ("inference", "c"))
}


def sync_file(helm: Helm, values: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    (found,) = [entry for entry in helm.render(values, **options) if entry["kind"] == "ConfigMap"]
    assert found["data"].keys() == {"sync.json"}
    return json.loads(found["data"]["sync.json"])


def pools_of(helm: Helm, values: dict[str, Any] | None = None) -> Pools:
    return check_pools(sync_file(helm, values)["pools"], "sync.json")


# --- Pools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_the_pools_are_a_pools_file(each_helm, name):
    assert pools_of(each_helm, NAMED[name]).cpu.image


def test_by_default_a_run_asks_for_no_accelerator_and_starts_again_when_it_fails(helm):
    pools = pools_of(helm)
    assert (pools.inference.accelerator, pools.training.accelerator, pools.colocated) == (None, None, None)
    assert (pools.cpu.image, pools.training.image) == (
        f"ghcr.io/camopd/core:{__version__}",
        f"ghcr.io/camopd/trainer:{__version__}",
    )
    assert (pools.cpu.retries, pools.inference.retries, pools.training.retries) == (0, 2, 2)
    assert pools.cpu.env == pools.cpu.secrets == pools.cpu.labels == {}


def test_what_all_pods_share(helm):
    pools = pools_of(helm, NAMED["full"])
    assert pools.training.env == {
        "AWS_DEFAULT_REGION": "eu-1",
        "AWS_ENDPOINT_URL_S3": "https://s3.example",
        "CAMOPD_OUTPUT": "s3://bucket/camopd",
        "HF_HUB_OFFLINE": "0",
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
        "S3_ADDRESSING_STYLE": "path",
    }
    assert pools.training.secrets == {
        "AWS_ACCESS_KEY_ID": "camopd-s3/access-key",
        "AWS_SECRET_ACCESS_KEY": "camopd-s3/secret-key",
        "CAMOPD_TEACHER_API_KEY": "teacher/api-key",
        "CAMOPD_WEBHOOK_URL": "chat/url",
        "HF_TOKEN": "hub/token",
        "MLFLOW_TRACKING_TOKEN": "mlflow/token",
    }
    assert pools.cpu.env == pools.training.env | {"LOG": "debug"}
    assert pools.cpu.secrets == pools.training.secrets | {"OTHER": "other/key"}
    for pool in (pools.cpu, pools.inference, pools.training, pools.colocated):
        assert pool is not None
        assert (pool.image_pull_secrets, pool.image_pull_policy, pool.ca_bundle) == (
            ("registry",),
            "IfNotPresent",
            "company-ca/ca.crt",
        )


def test_what_a_pool_says_of_its_own(helm):
    pools = pools_of(helm, NAMED["full"])
    inference = pools.inference
    assert (inference.image, inference.accelerator, inference.count) == (DIGESTS["inference"], "nvidia.com/gpu", 1)
    assert (inference.cpu, inference.memory, inference.shm, inference.scratch) == ("8", "64Gi", "8Gi", "200Gi")
    assert inference.selectors == {"nvidia.com/gpu.product": "NVIDIA-L40S"}
    assert [toleration.model_dump(exclude_none=True) for toleration in inference.tolerations] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    labels = {"team": "vision", "azure.workload.identity/use": "true", "camopd.io/release": "camopd"}
    assert inference.labels == labels, "what a network policy selects by is there"
    assert (inference.queue, inference.priority_class, inference.timeout_minutes) == ("gpus", "low", 1234567)
    assert pools.colocated is not None
    assert pools.colocated.node_affinity is not None
    assert pools.colocated.node_affinity.as_kubernetes() == NAMED["full"]["pools"]["colocated"]["nodeAffinity"]


def test_several_nodes_are_a_job(helm):
    job = JobSpec.model_validate_json(pools_of(helm, NAMED["full"]).training.job())
    assert (job.nodes, job.runtime, job.runtime_kind) == (2, "torch-distributed", "ClusterTrainingRuntime")
    assert (job.image, job.accelerator, job.count) == (DIGESTS["trainer"], "nvidia.com/gpu", 8)
    assert (job.resources, job.service_account, job.queue) == ({"rdma/ib": "8"}, "nodes", "gpus")


def test_the_pipeline_compiles_and_takes_every_image_from_the_chart(helm, tmp_path):
    (tmp_path / "pools.json").write_text(json.dumps(sync_file(helm, NAMED["full"])["pools"]), encoding="utf-8")
    compile_pipeline(tmp_path / "recovery.yaml", tmp_path / "pools.json")
    text = (tmp_path / "recovery.yaml").read_text(encoding="utf-8")
    images = {
        executor["container"]["image"] for executor in next(yaml.safe_load_all(text))["deploymentSpec"]["executors"].values()
    }
    assert images == set(DIGESTS.values())
    assert "ghcr.io" not in text


@pytest.mark.parametrize(
    ("values", "image"),
    [
        ({"images": {"core": {"tag": "1.2"}}}, "ghcr.io/camopd/core:1.2"),
        ({"images": {"core": {"registry": "a.example", "repository": "b/c"}}}, f"a.example/b/c:{__version__}"),
        ({"imageRegistry": "a.example/m"}, f"a.example/m/camopd/core:{__version__}"),
        ({"imageRegistry": "a.example", "global": {"imageRegistry": "b.example"}}, f"b.example/camopd/core:{__version__}"),
        ({"images": {"core": {"tag": "1.2", "digest": f"sha256:{'0' * 64}"}}}, f"ghcr.io/camopd/core@sha256:{'0' * 64}"),
    ],
)
def test_where_an_image_comes_from(helm, values, image):
    objects = helm.render(values)
    assert json.loads(one(objects, "ConfigMap", "camopd")["data"]["sync.json"])["pools"]["cpu"]["image"] == image
    assert one(objects, "Job", "camopd-sync")["spec"]["template"]["spec"]["containers"][0]["image"] == image


# --- Schedules and names --------------------------------------------------------------------------------------------------


def test_the_file_says_whose_it_is_and_what_it_wants(helm):
    file = sync_file(helm, NAMED["full"], release="nightly")
    assert {key: file[key] for key in ("owner", "pipeline", "experiment", "namespace", "service_account", "time_zone")} == {
        "time_zone": "UTC",
        "owner": "ml/nightly-camopd",
        "pipeline": "camopd-recovery",
        "experiment": "camopd",
        "namespace": "ml",
        "service_account": "nightly-camopd",
    }
    assert file["schedules"] == [
        {
            "name": "icd-coder",
            "cron": "0 0 2 * * *",
            "follow": "models:/icd-coder@latest-tuned",
            "recipe": "medical-8b",
            "parameters": {"method_seed": 12345678, "output_promote": True, "method_learning_rate": "2e-6"},
            "max_attempts": 3,
            "again_for_new_teachers": False,
            "enabled": True,
        },
        {
            "name": "role-player",
            "cron": "0 30 3 * * 1",
            "follow": "s3://bucket/models/role-player",
            "recipe": 'name = "role-player"\nseed = 1\n',
            "parameters": {},
            "max_attempts": 5,
            "again_for_new_teachers": True,
            "enabled": False,
        },
    ]


@pytest.mark.parametrize(
    ("name", "namespace", "account"),
    [("default", "", "camopd"), ("outside", "ml", ""), ("small", "", "default-editor")],
)
def test_where_and_as_whom_runs_are_made(helm, name, namespace, account):
    file = sync_file(helm, NAMED[name])
    assert (file["namespace"], file["service_account"]) == (namespace, account)


def test_a_change_of_what_is_compiled_in_is_a_new_version_and_nothing_else_is(helm):
    def version(**values: Any) -> str:
        return sync_file(helm, values)["version"]

    assert re.fullmatch(r"0\.1\.0-[0-9a-f]{12}", version())
    assert version() == version(commonLabels={"a": "b"}, schedules=NAMED["full"]["schedules"], sync={"backoffLimit": 1})
    changed = [
        version(images={"core": {"tag": "2"}}),
        version(pools={"cpu": {"memory": "5Gi"}}),
        version(output="s3://bucket/x"),
    ]
    assert len({version(), *changed}) == 4


def test_large_integers_stay_integers(each_helm):
    values = NAMED["full"] | {"pools": NAMED["full"]["pools"] | {"cpu": {"timeoutMinutes": 1000000}}}
    text = each_helm.text(values)
    assert not re.search(r"\d[eE]\+?\d", re.sub(r"[0-9a-f]{12,}", "", text).replace("2e-6", ""))
    file = sync_file(each_helm, values)
    assert file["schedules"][0]["parameters"]["method_seed"] == 12345678
    assert isinstance(file["schedules"][0]["parameters"]["method_seed"], int)
    assert file["pools"]["cpu"]["timeout_minutes"] == 1000000
    assert isinstance(file["pools"]["cpu"]["timeout_minutes"], int)
