"""Hook Jobs and the pods of `helm test`: when they run, what they run, and that the restricted standard lets them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helm.conftest import NAMED, Object, env_of, one, pods_in

TOKEN = "/var/run/secrets/kubeflow/pipelines/token"
CA = "/etc/camopd-ca/ca.crt"


def hook_of(entry: Object) -> Object:
    return {
        k.removeprefix("helm.sh/"): v for k, v in entry["metadata"].get("annotations", {}).items() if k.startswith("helm.sh/")
    }


def variables(pod: Object) -> dict[str, Any]:
    """Values, and name/key of the Secret where it is a reference."""
    found = {}
    for entry in env_of(pod):
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        assert entry["name"] not in found, "a name twice"
        found[entry["name"]] = f"{reference['name']}/{reference['key']}" if reference else entry["value"]
    return found


# --- When and what --------------------------------------------------------------------------------------------------------


def test_a_sync_after_install_upgrade_and_rollback_and_a_removal_before_uninstall(helm):
    objects = helm.render()
    assert hook_of(one(objects, "Job", "camopd-sync")) == {
        "hook": "post-install,post-upgrade,post-rollback",
        "hook-weight": "0",
        "hook-delete-policy": "before-hook-creation,hook-succeeded",
    }
    assert hook_of(one(objects, "Job", "camopd-remove"))["hook"] == "pre-delete"
    assert {name: pod["spec"]["containers"][0]["command"] for name, pod in pods_in(objects).items()} == {
        "camopd-sync": ["camopd", "sync", "/etc/camopd/sync.json"],
        "camopd-remove": ["camopd", "sync", "/etc/camopd/sync.json", "--remove"],
        "camopd-test-kfp": ["camopd", "sync", "/etc/camopd/sync.json", "--dry-run"],
        "camopd-test-stores": ["camopd", "check"],
    }


@pytest.mark.parametrize("name", NAMED)
def test_what_a_hook_needs_is_there_before_it_and_after_it(helm, name):
    objects = helm.render(NAMED[name])
    lasting = {(entry["kind"], entry["metadata"]["name"]) for entry in objects if not hook_of(entry)}
    given = {("ConfigMap", "company-ca"), ("ServiceAccount", "default"), ("ServiceAccount", "default-editor")}
    assert not [entry for entry in objects if hook_of(entry) and entry["kind"] not in ("Job", "Pod")]
    for maker, pod in pods_in(objects).items():
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in lasting | given, maker
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in lasting | given, maker
        mounts = {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}, maker


def test_each_part_can_be_left_out(helm):
    assert pods_in(helm.render(NAMED["small"])) == {}
    assert set(pods_in(helm.render({"sync": {"enabled": False}}))) == {"camopd-remove", "camopd-test-kfp", "camopd-test-stores"}
    assert set(pods_in(helm.render({"tests": {"enabled": False}}))) == {"camopd-sync", "camopd-remove"}


def test_a_job_ends_and_is_cleared_away(helm):
    spec = one(helm.render(NAMED["full"]), "Job", "camopd-sync")["spec"]
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (2, 1234567, 12345678)
    assert one(helm.render(), "Job", "camopd-remove")["spec"]["activeDeadlineSeconds"] == 600


# --- What they are given --------------------------------------------------------------------------------------------------


def test_kubeflow_pipelines_is_asked_in_the_cluster_and_needs_no_token_without_users(helm):
    pods = pods_in(helm.render({"kfp": {"namespace": "pipelines"}}))
    for name in ("camopd-sync", "camopd-remove", "camopd-test-kfp"):
        assert variables(pods[name]) == {"KFP_HOST": "http://ml-pipeline.pipelines.svc.cluster.local:8888"}
        assert [volume["name"] for volume in pods[name]["spec"]["volumes"]] == ["tmp", "config"]
    assert env_of(pods["camopd-test-stores"]) == []


def test_with_users_the_hooks_show_a_token_that_is_for_pipelines_alone(helm):
    pod = pods_in(helm.render(NAMED["full"]))["camopd-sync"]
    assert variables(pod) == {
        "KFP_HOST": "http://ml-pipeline.kubeflow.svc.cluster.local:8888",
        "KF_PIPELINES_UI_ENDPOINT": "https://kfp.example",
        "KF_PIPELINES_SA_TOKEN_PATH": TOKEN,
        "KFP_CA_FILE": CA,
        "AWS_CA_BUNDLE": CA,
        "REQUESTS_CA_BUNDLE": CA,
        "SSL_CERT_FILE": CA,
        "HTTPS_PROXY": "http://proxy.example:3128",
    }
    (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "kfp-token"]
    (source,) = volume["projected"]["sources"]
    assert source["serviceAccountToken"] == {"path": "token", "audience": "pipelines.kubeflow.org", "expirationSeconds": 3600}
    (mount,) = [mount for mount in pod["spec"]["containers"][0]["volumeMounts"] if mount["name"] == "kfp-token"]
    assert f"{mount['mountPath']}/token" == TOKEN


def test_from_outside_the_hooks_show_the_token_of_a_secret(helm):
    pod = pods_in(helm.render(NAMED["outside"]))["camopd-sync"]
    assert variables(pod) == {"KFP_HOST": "https://kubeflow.example/pipeline", "KFP_TOKEN": "kfp-token/token"}
    assert "kfp-token" not in [volume["name"] for volume in pod["spec"]["volumes"]]


def test_the_stores_are_tried_as_a_run_would_and_by_its_account(helm):
    pod = pods_in(helm.render(NAMED["full"]))["camopd-test-stores"]
    assert pod["spec"]["serviceAccountName"] == "camopd"
    given = variables(pod)
    assert given["CAMOPD_OUTPUT"] == "s3://bucket/camopd"
    assert given["AWS_SECRET_ACCESS_KEY"] == "camopd-s3/secret-key"
    assert given["MLFLOW_TRACKING_TOKEN"] == "mlflow/token"
    assert given["SSL_CERT_FILE"] == CA
    assert not [name for name in given if name.startswith("KF")]
    assert pod["metadata"]["labels"]["azure.workload.identity/use"] == "true"


def test_a_bundle_of_one_s_own_is_left_alone(helm):
    values = {"caBundle": {"configMap": "company-ca"}, "env": {"AWS_CA_BUNDLE": "/tmp/x"}, "secrets": {"SSL_CERT_FILE": "a/b"}}
    given = variables(pods_in(helm.render(values))["camopd-test-stores"])
    assert given == {"AWS_CA_BUNDLE": "/tmp/x", "SSL_CERT_FILE": "a/b", "REQUESTS_CA_BUNDLE": CA}


def test_where_they_run_is_theirs(helm):
    pod = pods_in(helm.render(NAMED["full"]))["camopd-sync"]
    sync = NAMED["full"]["sync"]
    for name in ("nodeSelector", "tolerations", "affinity", "priorityClassName"):
        assert pod["spec"][name] == sync[name]
    assert pod["metadata"]["labels"]["team"] == "platform"
    assert pod["metadata"]["annotations"] == {"note": "hook"}
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]


# --- Pod Security: restricted ---------------------------------------------------------------------------------------------

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def violations(spec: Object) -> Iterator[str]:
    """What the restricted Pod Security Standard forbids (kubernetes.io/docs/concepts/security/pod-security-standards)."""
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec.get("volumes", []):
        yield from volume.keys() - {"name"} - VOLUMES
    of_pod = spec.get("securityContext", {})
    if of_pod.get("sysctls"):
        yield "sysctls"
    for container in [*spec["containers"], *spec.get("initContainers", []), *spec.get("ephemeralContainers", [])]:
        own = container.get("securityContext", {})
        effective = of_pod | own
        capabilities = own.get("capabilities", {})
        checks = {
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "capabilities.drop": "ALL" in capabilities.get("drop", []),
            "capabilities.add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": effective.get("runAsNonRoot") is True,
            "runAsUser": effective.get("runAsUser") != 0,
            "seccompProfile": effective.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        }
        yield from (name for name, kept in checks.items() if not kept)


@pytest.mark.parametrize("name", NAMED)
def test_every_pod_keeps_the_restricted_standard(helm, name):
    for maker, pod in pods_in(helm.render(NAMED[name])).items():
        assert list(violations(pod["spec"])) == [], maker


BREAKS: dict[str, Callable[[Object], Any]] = {
    "hostNetwork": lambda spec: spec.update(hostNetwork=True),
    "hostPath": lambda spec: spec["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "runAsNonRoot": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
    "runAsUser": lambda spec: spec["containers"][0]["securityContext"].update(runAsUser=0),
    "seccompProfile": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "capabilities.drop": lambda spec: spec["containers"][0]["securityContext"].pop("capabilities"),
    "allowPrivilegeEscalation": lambda spec: spec["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
    "privileged": lambda spec: spec["containers"][0]["securityContext"].update(privileged=True),
}


@pytest.mark.parametrize("sentence", BREAKS)
def test_the_standard_is_looked_at_for_real(helm, sentence):
    spec = copy.deepcopy(pods_in(helm.render())["camopd-sync"]["spec"])
    BREAKS[sentence](spec)
    assert list(violations(spec)) == [sentence]


def test_nothing_is_writable_but_tmp_and_every_pod_has_bounds(helm):
    for pod in pods_in(helm.render(NAMED["full"])).values():
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")] == ["/tmp"]
        assert container["resources"]["limits"]["memory"]
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False
        assert pod["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"


def test_the_standard_is_not_the_values_to_lower(helm):
    values = {"sync": {"podSecurityContext": {"runAsNonRoot": False, "seccompProfile": {"type": "Unconfined"}, "fsGroup": 7}}}
    context = pods_in(helm.render(values))["camopd-sync"]["spec"]["securityContext"]
    assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}, "fsGroup": 7}
