"""The pools file: what is wrong with it is said in one go and by name."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from camopd.errors import InputError
from camopd.trainjob import JobSpec
from components import TRAINER
from pipelines.compile import compile_pipeline
from pipelines.pools import Pools, load_pools

NODES = '[training]\nnodes = 2\nruntime = "torch-distributed"\n'
SHARING = """
[all]
env = { AWS_ENDPOINT_URL_S3 = "https://s3.example", HF_HUB_OFFLINE = "1" }
secrets = { AWS_ACCESS_KEY_ID = "camopd-s3/access-key", AWS_SECRET_ACCESS_KEY = "camopd-s3/secret-key" }
image_pull_secrets = ["registry"]
image_pull_policy = "IfNotPresent"

[inference]
env = { HF_HUB_OFFLINE = "0", MLFLOW_TRACKING_URI = "http://mlflow:5000" }
secrets = { CAMOPD_TEACHER_API_KEY = "teacher/key", AWS_CA_BUNDLE = "teacher/key", AWS_ENDPOINT_URL_S3 = "camopd-s3/url" }
image_pull_secrets = ["registry-of-vllm", "mirror"]
image_pull_policy = "Always"
"""
OFFLINE = {"AWS_ENDPOINT_URL_S3": "https://s3.example", "HF_HUB_OFFLINE": "1"}
KEYS = {"AWS_ACCESS_KEY_ID": "camopd-s3/access-key", "AWS_SECRET_ACCESS_KEY": "camopd-s3/secret-key"}


def affinity(operator: str, values: list[str]) -> str:
    """A preference for nodes, as a line of a pools file."""
    term = f'{{ matchExpressions = [{{ key = "gpu", operator = "{operator}", values = {json.dumps(values)} }}] }}'
    preferred = f"preferredDuringSchedulingIgnoredDuringExecution = [{{ weight = 10, preference = {term} }}]"
    return f"node_affinity = {{ {preferred} }}\n"


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "pools.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_pools(path)
    return str(caught.value)


def test_without_a_file_everything_runs_on_cpu():
    assert load_pools(None) == Pools()
    assert Pools().training.accelerator is None


def test_the_example_holds_all_pools():
    pools = load_pools(Path("pipelines/pools.example.toml"))
    assert (pools.cpu.accelerator, pools.inference.count, pools.training.count) == (None, 1, 8)
    assert pools.colocated is not None
    assert (pools.colocated.count, pools.colocated.selectors) == (1, pools.training.selectors)


def test_every_problem_is_named_at_once(tmp_path):
    message = refused(tmp_path, '[training]\nmemory = "lots"\ngpus = 8\n[inferense]\ncount = 1\n')
    assert message.startswith("3 problems")
    for part in ("training.memory", "Kubernetes quantity", "training.gpus", "inferense", "inference, training and colocated"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('[training]\naccelerator = "nvidia.com/gpu"\n', "accelerator and count belong together"),
        ("[training]\ncount = 2\n", "accelerator and count belong together"),
        ('[cpu]\naccelerator = "nvidia.com/gpu"\ncount = 1\n', "cpu pool must not ask for an accelerator"),
        ("[training]\ncount = -1\n", "training.count"),
        ('[training]\ntolerations = [{ key = "gpu", effect = "Sometimes" }]\n', "training.tolerations.0.effect"),
        ("[training\n", "is not TOML"),
        ("[training]\nnodes = 0\n", "training.nodes"),
        (
            "[training]\nnodes = 2\n",
            'training: nodes above 1 need a runtime of Kubeflow Trainer, such as runtime = "torch-distributed"',
        ),
        (
            '[training]\nservice_account = "nodes"\nenv = {A = "1"}\n',
            "training: service_account belong to a job on several nodes: set nodes above 1",
        ),
        (f'{NODES}image_pull_policy = "Always"\n', "image_pull_policy of a job's pods is the runtime's"),
        ("[all]\ncount = 1\n", "all.count"),
        ('[all]\nca_bundle = "company-ca"\n', 'write "configmap-name/key"'),
        ('[all]\nlabels = { "team!" = "a" }\n', "write a Kubernetes label"),
        ('[inference]\npriority_class = "high"\n', "priority_class is Kueue's, so it needs a queue"),
        (f"[inference]\n{affinity('Near', ['a'])}", "operator"),
        (f"[inference]\n{affinity('In', [])}", "In and NotIn take values, Gt and Lt one"),
        (f"[inference]\n{affinity('Gt', ['1', '2'])}", "In and NotIn take values, Gt and Lt one"),
        ("[inference]\nnode_affinity = { podAffinity = {} }\n", "inference.node_affinity.podAffinity"),
        ('[all]\nimage_pull_policy = "Sometimes"\n', "all.image_pull_policy"),
        ('[all]\nimage_pull_secrets = ["My Registry"]\n', "write the name of a Kubernetes object"),
        ('[cpu]\nenv = { MLFLOW_TRACKING_PASSWORD = "x" }\n', "cpu.env: MLFLOW_TRACKING_PASSWORD look like secrets"),
        ('[all]\nenv = { MLFLOW_TRACKING_URI = "http://me:pass@host" }\n', "all.env: MLFLOW_TRACKING_URI look like secrets"),
        ('[colocated]\nsecrets = { A = "a" }\n', 'write VARIABLE = "secret-name/key"'),
        ('[inference]\nenv = { A = "2" }\nsecrets = { A = "a/b" }\n', "inference: A are in env and in secrets: leave one out"),
        ("[inference]\nnodes = 2\n", "inference.nodes"),
        (f'{NODES}runtime_kind = "Runtime"\n', "training.runtime_kind"),
        (f'{NODES}service_account = "Default Editor"\n', "training.service_account: String should match"),
        (f'{NODES}resources = {{ "rdma/ib" = "some" }}\n', "training.resources.rdma/ib"),
        (f'{NODES}env = {{ PET_NNODES = "2" }}\n', "training.env: PET_NNODES are set by the runtime"),
        (f'{NODES}env = {{ A = "2" }}\nsecrets = {{ A = "a/b" }}\n', "training: A are in env and in secrets: leave one out"),
        (f'{NODES}env = {{ "A-B" = "2" }}\n', "write the name of a variable"),
        (f'{NODES}env = {{ AWS_SECRET_ACCESS_KEY = "AKIA" }}\n', "training.env: AWS_SECRET_ACCESS_KEY look like secrets"),
        (f'{NODES}secrets = {{ HF_TOKEN = "hf_abc" }}\n', 'write VARIABLE = "secret-name/key"'),
    ],
)
def test_a_pool_that_cannot_work_is_refused(tmp_path, text, part):
    assert part in refused(tmp_path, text)


def test_a_file_in_json_says_what_one_in_toml_says(tmp_path):
    example = Path("pipelines/pools.example.toml")
    path = tmp_path / "pools.json"
    path.write_text(json.dumps(tomllib.loads(example.read_text(encoding="utf-8"))))
    assert load_pools(path) == load_pools(example)
    path.write_text('{"training": {"gpus": 8}}')
    with pytest.raises(InputError, match=r"pools\.json: training\.gpus"):
        load_pools(path)
    path.write_text("[training]")
    with pytest.raises(InputError, match=r"pools\.json: is not JSON"):
        load_pools(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml: no such file"):
        load_pools(tmp_path / "none.toml")


def test_what_a_job_on_several_nodes_asks_for_is_what_the_pool_says(tmp_path):
    path = tmp_path / "pools.toml"
    example = Path("pipelines/pools.example.toml").read_text(encoding="utf-8")
    settings = f"""
service_account = "camopd-nodes"
queue = "gpus"
priority_class = "nightly"
labels = {{ team = "nlp" }}
{affinity("In", ["h100"])}resources = {{ "rdma/ib" = "8" }}
env = {{ TOKENIZERS_PARALLELISM = "false" }}
secrets = {{ AWS_SECRET_ACCESS_KEY = "camopd-s3/secret-key" }}
"""
    path.write_text(example.replace("[training] ", NODES + settings + "#"), encoding="utf-8")
    assert JobSpec.model_validate_json(load_pools(path).training.job()) == JobSpec(
        nodes=2,
        runtime="torch-distributed",
        image=TRAINER,
        accelerator="nvidia.com/gpu",
        count=8,
        cpu="64",
        memory="512Gi",
        shm="64Gi",
        scratch="1Ti",
        selectors={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        tolerations=({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},),
        service_account="camopd-nodes",
        queue="gpus",
        priority_class="nightly",
        labels={"team": "nlp"},
        node_affinity={
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 10, "preference": {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h100"]}]}}
            ]
        },
        resources={"rdma/ib": "8"},
        env={"TOKENIZERS_PARALLELISM": "false"},
        secrets={"AWS_SECRET_ACCESS_KEY": "camopd-s3/secret-key"},
        timeout_minutes=1440,
    )


def test_what_the_docs_and_the_example_say_of_several_nodes_is_taken(tmp_path):
    blocks = re.findall(r"(?s)```toml\n(\[(?:all|training)\].*?)```", Path("docs/scale.md").read_text(encoding="utf-8"))
    assert len(blocks) == 2
    example = Path("pipelines/pools.example.toml").read_text(encoding="utf-8")
    for text in ("".join(blocks), re.sub(r"(?m)^# (?=\w+ = )", "", example)):
        (tmp_path / "pools.toml").write_text(text, encoding="utf-8")
        training = load_pools(tmp_path / "pools.toml").training
        assert (training.nodes, training.runtime) == (2, "torch-distributed")
        assert training.secrets["AWS_ACCESS_KEY_ID"] == "camopd-s3/access-key"


# --- What pods are given --------------------------------------------------------------------------------------------------


def compiled(folder: Path, pools: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The compiled text, and by component its container and what the platform adds."""
    (folder / "pools.toml").write_text(pools, encoding="utf-8")
    compile_pipeline(folder / "recovery.yaml", folder / "pools.toml")
    text = (folder / "recovery.yaml").read_text(encoding="utf-8")
    spec, platform = yaml.safe_load_all(text)
    containers = {name: executor["container"] for name, executor in spec["deploymentSpec"]["executors"].items()}
    return text, containers, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


def references(pod: dict[str, Any]) -> dict[str, str]:
    """Variables with name/key of the Secret that the backend takes them from."""
    found = {}
    for entry in pod.get("secretAsEnv", []):
        (mapping,) = entry["keyToEnv"]
        assert entry["secretNameParameter"] == {"runtimeValue": {"constant": entry["secretName"]}}
        found[mapping["envVar"]] = f"{entry['secretName']}/{mapping['secretKey']}"
    return found


def test_every_pod_is_given_what_all_share_and_what_its_pool_adds(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-value-of-the-secret")
    text, containers, pods = compiled(tmp_path, SHARING)
    assert containers.keys() == pods.keys()
    assert "the-value-of-the-secret" not in text
    sampling = {name for name in pods if re.fullmatch(r"exec-(rollout|score|evaluate)(-\d+)?", name)}
    assert len(sampling) > 3
    assert {"exec-prepare", "exec-train", "exec-recover", "exec-report-outcome"} < pods.keys() - sampling
    for name in pods.keys() - sampling:
        assert variables(containers[name]) == OFFLINE, name
        assert references(pods[name]) == KEYS, name
        assert pods[name]["imagePullPolicy"] == "IfNotPresent", name
        assert [entry["secretName"] for entry in pods[name]["imagePullSecret"]] == ["registry"], name
    for name in sampling:
        assert variables(containers[name]) == {"HF_HUB_OFFLINE": "0", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}, name
        own = {"CAMOPD_TEACHER_API_KEY": "teacher/key", "AWS_CA_BUNDLE": "teacher/key", "AWS_ENDPOINT_URL_S3": "camopd-s3/url"}
        assert references(pods[name]) == KEYS | own, "two variables of one key are both there"
        assert pods[name]["imagePullPolicy"] == "Always", name
        assert [entry["secretName"] for entry in pods[name]["imagePullSecret"]] == ["registry-of-vllm", "mirror"], name


def test_a_job_s_pods_are_given_the_same_and_the_step_that_launches_it_is_a_cpu_pod(tmp_path):
    sharing = SHARING + NODES + 'env = { NCCL_DEBUG = "WARN" }\nsecrets = { HF_HUB_OFFLINE = "hub/offline" }\n'
    _, containers, pods = compiled(tmp_path, sharing)
    job = JobSpec.model_validate_json(load_pools(tmp_path / "pools.toml").training.job())
    assert job.env == {"AWS_ENDPOINT_URL_S3": "https://s3.example", "NCCL_DEBUG": "WARN"}
    assert job.secrets == KEYS | {"HF_HUB_OFFLINE": "hub/offline"}
    assert job.image_pull_secrets == ("registry",)
    assert variables(containers["exec-train"]) == variables(containers["exec-select"]) == OFFLINE
    assert references(pods["exec-train"]) == KEYS


def test_without_a_word_of_it_pods_are_given_nothing(tmp_path):
    _, containers, pods = compiled(tmp_path, '[training]\nshm = "8Gi"\n')
    assert not any("env" in container for container in containers.values())
    asked = set().union(*pods.values())
    assert asked == {"emptyDirMounts"}


def test_labels_queue_and_affinity_are_those_of_the_pods(tmp_path):
    pools = '[all]\nlabels = { team = "nlp", cost = "research" }\n'
    pools += f'[inference]\nlabels = {{ cost = "gpu" }}\nqueue = "gpus"\npriority_class = "low"\n{affinity("In", ["l40s"])}'
    _, _, pods = compiled(tmp_path, pools)
    assert pods["exec-prepare"]["podMetadata"] == {"labels": {"team": "nlp", "cost": "research"}}
    assert "nodeAffinity" not in pods["exec-prepare"]
    assert pods["exec-rollout"]["podMetadata"]["labels"] == {
        "team": "nlp",
        "cost": "gpu",
        "kueue.x-k8s.io/queue-name": "gpus",
        "kueue.x-k8s.io/priority-class": "low",
    }
    (term,) = pods["exec-rollout"]["nodeAffinity"]
    nodes = {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["l40s"]}]}
    assert term["nodeAffinityJson"]["runtimeValue"]["constant"] == {
        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 10, "preference": nodes}]
    }


def test_a_bundle_of_certificates_is_mounted_and_named(tmp_path):
    pools = '[all]\nca_bundle = "company-ca/ca.crt"\n[cpu]\nsecrets = { AWS_CA_BUNDLE = "s3/bundle" }\n'
    _, containers, pods = compiled(tmp_path, pools)
    path = "/etc/camopd-ca/ca.crt"
    named = {"REQUESTS_CA_BUNDLE": path, "SSL_CERT_FILE": path}
    assert variables(containers["exec-prepare"]) == named, "what a Secret says is left alone"
    assert variables(containers["exec-rollout"]) == {"AWS_CA_BUNDLE": path, **named}
    (volume,) = pods["exec-rollout"]["configMapAsVolume"]
    assert (volume["configMapName"], volume["mountPath"]) == ("company-ca", "/etc/camopd-ca")
    assert not volume.get("optional")


def test_pods_of_an_image_by_digest_know_which_one_they_run(tmp_path):
    digest = f"sha256:{'0123456789abcdef' * 4}"
    by_tag, by_digest = 'image = "registry.example/core:1"\n', f'image = "registry.example/trainer:1@{digest}"\n'
    _, containers, _ = compiled(tmp_path, f'[cpu]\n{by_tag}[inference]\nshm = "1Gi"\n{by_digest}{NODES}{by_digest}')
    told = {name.removeprefix("exec-"): variables(container) for name, container in containers.items()}
    assert told["rollout"]["CAMOPD_IMAGE_DIGEST"] == told["evaluate"]["CAMOPD_IMAGE_DIGEST"] == digest
    assert "CAMOPD_IMAGE_DIGEST" not in told["promote"], "a tag is no digest"
    assert load_pools(tmp_path / "pools.toml").training.variables == {"CAMOPD_IMAGE_DIGEST": digest}
    assert JobSpec.model_validate_json(load_pools(tmp_path / "pools.toml").training.job()).env["CAMOPD_IMAGE_DIGEST"] == digest
