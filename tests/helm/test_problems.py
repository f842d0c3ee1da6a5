"""Values that cannot work are refused before anything is made, with what to do."""

from typing import Any

import pytest


def schedule(**changes: Any) -> dict[str, Any]:
    return {"schedules": [{"name": "a", "cron": "0 0 2 * * *", "follow": "models:/a@b", "recipe": "micro"} | changes]}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (schedule(cron="0 2 * * *"), 'schedules[0].cron: "0 2 * * *" has 5 fields'),
        (schedule(cron="0 2 * * *"), 'wants six, seconds first: write "0 0 2 * * *"'),
        (schedule(cron="@daily"), "has 1 fields"),
        (schedule(cron="2"), "has 1 fields, and Kubeflow Pipelines wants six, seconds first: such as"),
        (schedule(follow="icd-coder"), 'schedules[0].follow: "icd-coder" is not understood; write models:/NAME@ALIAS'),
        (schedule(follow="models:/a"), "is not understood"),
        ({"schedules": schedule()["schedules"] * 2}, 'schedules[1].name: there are two schedules "a"'),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "env.AWS_SECRET_ACCESS_KEY looks like a secret: put it into a Secret"),
        ({"env": {"MLFLOW_TRACKING_URI": "http://me:pass@host"}}, "env.MLFLOW_TRACKING_URI looks like a secret"),
        ({"pools": {"cpu": {"env": {"HF_TOKEN": "x"}}}}, "its name and key into pools.cpu.secrets"),
        ({"secrets": {"HF_TOKEN": "hf_abc"}}, "secrets.HF_TOKEN: write name/key of a Secret that exists, never its value"),
        ({"requireDigest": True}, "images.core.digest: requireDigest is set; give sha256:..."),
        ({"output": "bucket/runs"}, 'output: "bucket/runs" is not an object store\'s prefix; pods share no disk, so write s3://bucket/prefix'),
        ({"output": "/runs"}, "write s3://bucket/prefix"),
        ({"pools": {"training": {"accelerator": {"name": "nvidia.com/gpu"}}}}, "pools.training.accelerator: name and count"),
        ({"pools": {"inference": {"accelerator": {"count": 1}}}}, "pools.inference.accelerator: name and count"),
        ({"pools": {"training": {"nodes": 2}}}, "pools.training.runtime: several nodes need a runtime of Kubeflow Trainer"),
        ({"pools": {"training": {"runtime": "x"}}}, "belong to several nodes; set nodes above 1"),
        ({"pools": {"inference": {"priorityClass": "high"}}}, "is Kueue's, so it needs pools.inference.queue"),
        ({"networkPolicy": {"enabled": True}}, "networkPolicy.kubernetesApi.cidrs: pods of runs ask the Kubernetes API"),
    ],
)  # fmt: skip
def test_a_common_mistake_is_told_with_its_remedy(each_helm, values, sentence):
    assert sentence in each_helm.refused(values)


def test_all_mistakes_are_told_at_once(helm):
    told = helm.refused(schedule(cron="* * * * *") | {"output": "x", "requireDigest": True})
    assert "4 problem(s) in the values of camopd" in told
    assert "schedules[0].cron" in told
    assert "images.trainer.digest" in told
    assert "images.inference" not in told, "no pool uses it"


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"outputs": "s3://bucket"}, "outputs"),
        ({"pools": {"cpu": {"gpus": 1}}}, "gpus"),
        ({"pools": {"cpu": {"accelerator": {}}}}, "accelerator"),
        ({"pools": {"gpu": {}}}, "gpu"),
        ({"pools": {"training": {"retries": 1.5}}}, "retries"),
        ({"pools": {"training": {"retries": "2"}}}, "retries"),
        ({"pools": {"training": {"image": "ghcr.io/x:1"}}}, "image"),
        ({"pools": {"training": {"memory": "lots"}}}, "memory"),
        ({"pools": {"training": {"nodeAffinity": {"podAffinity": {}}}}}, "podAffinity"),
        ({"pools": {"training": {"tolerations": [{"key": "a", "effect": "Sometimes"}]}}}, "effect"),
        ({"pools": None}, "pools"),
        ({"images": {"core": {"digest": "sha256:abc"}}}, "digest"),
        ({"kfp": {"host": "kubeflow.example"}}, "host"),
        ({"env": {"A-B": "x"}}, "A-B"),
        ({"env": {"A": 1}}, "env"),
        ({"sync": {"backoffLimit": -1}}, "backoffLimit"),
        (schedule(every="night"), "every"),
        (schedule(name="No Name"), "name"),
        (schedule(maxAttempts=0), "axAttempts"),
        (schedule(parameters={"schedule_name": "x"}), "schedule_name"),
        ({"schedules": [{"name": "a"}]}, "cron"),
        ({"imagePullPolicy": "Sometimes"}, "imagePullPolicy"),
    ],
)
def test_what_the_schema_does_not_know_is_refused_by_name(each_helm, values, place):
    told = each_helm.refused(values)
    assert "don't meet the specifications of the schema" in told
    assert place in told


def test_a_parent_s_globals_are_not_ours_to_judge(helm):
    assert helm.render({"global": {"imageRegistry": "", "storageClass": "fast"}})
