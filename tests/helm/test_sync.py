"""A release's life on a KFP API server with users: what its hooks and tests run, with the file and variables they are given."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camopd.kubeflow import sync
from camopd.kubeflow.schedules import read
from tests.fixtures.kfp_api import KfpApi, kfp_teams  # noqa: F401 (fixture)
from tests.helm.conftest import NAMED, Helm, Object, env_of, one, pods_in, rights
from tests.kubeflow.conftest import camopd, nobodys_cluster  # noqa: F401 (fixtures)

# Who has two schedules there, of a model in the registry and of one on S3.
VALUES: dict[str, Any] = {
    "kfp": {"multiUser": True},
    "output": "s3://bucket/camopd",
    "pools": {"inference": {"image": "inference"}},
    "schedules": [
        {
            "name": "icd",
            "cron": "0 0 2 * * *",
            "follow": "models:/icd@tuned",
            "recipe": "medical-8b",
            "parameters": {"method_seed": 7},
        },
        {"name": "legal", "cron": "0 0 3 * * *", "follow": "s3://bucket/legal", "recipe": "medical-8b", "maxAttempts": 5},
    ],
}
# What the API server asks Kubernetes for, by its sources (backend/src/apiserver/server, IsAuthorized).
ASKED = [
    ("POST", r"/pipelines(/upload_version)?", "pipelines", "create"),
    ("GET", r"/pipelines(/[^/]+/versions)?", "pipelines", "list"),
    ("GET", r"/pipelines/[^/]+(/versions/[^/]+)?", "pipelines", "get"),
    ("POST", r"/experiments", "experiments", "create"),
    ("GET", r"/experiments", "experiments", "list"),
    ("POST", r"/recurringruns", "jobs", "create"),
    ("GET", r"/recurringruns", "jobs", "list"),
    ("POST", r"/recurringruns/[^/]+:enable", "jobs", "enable"),
    ("POST", r"/recurringruns/[^/]+:disable", "jobs", "disable"),
    ("DELETE", r"/recurringruns/[^/]+", "jobs", "delete"),
    ("GET", r"/runs", "runs", "list"),
]


class Cluster:
    """Helm's part and the kubelet's: a release's manifests, and its pods' commands run in this process."""

    def __init__(self, helm: Helm, api: KfpApi, folder: Path, monkeypatch: pytest.MonkeyPatch, camopd: Callable) -> None:  # noqa: F811
        self.helm, self.api, self._folder, self._monkeypatch, self._camopd = helm, api, folder, monkeypatch, camopd
        (folder / "token").write_text("token-a")
        self.objects: list[Object] = []

    def apply(self, values: dict[str, Any], release: str = "camopd") -> None:
        self.objects = self.helm.render(values, release=release, namespace="team-a")
        (config,) = [entry for entry in self.objects if entry["kind"] == "ConfigMap"]
        self.file = self._folder / "sync.json"
        self.file.write_text(config["data"]["sync.json"], encoding="utf-8")

    def run(self, suffix: str) -> tuple[int, str]:
        """Exit code and words of a hook or test, by its own command line and variables."""
        (pod,) = [pod for name, pod in pods_in(self.objects).items() if name.endswith(suffix)]
        with self._monkeypatch.context() as patch:
            for entry in env_of(pod):
                patch.setenv(entry["name"], entry["value"])
            patch.setenv("KFP_HOST", self.api.host)  # a name of the cluster's DNS
            patch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(self._folder / "token"))  # what the kubelet projects
            verb, *rest = pod["spec"]["containers"][0]["command"][1:]
            return self._camopd(verb, *[str(self.file) if word == "/etc/camopd/sync.json" else word for word in rest])

    def schedules(self) -> dict[str, Object]:
        """Recurring runs that are switched on, by schedule."""
        found = [each for each in self.api.recurring.values() if each["status"] == "ENABLED"]
        return {re.findall(r"schedule (\S+),", each["description"])[0]: each for each in found}


@pytest.fixture
def cluster(
    helm: Helm,
    kfp_teams: KfpApi,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    camopd: Callable,  # noqa: F811
) -> Cluster:
    monkeypatch.setattr(sync, "SETTLE_SECONDS", 0.0)
    return Cluster(helm, kfp_teams, tmp_path, monkeypatch, camopd)


@pytest.mark.slow
def test_install_test_upgrade_rollback_uninstall(cluster: Cluster) -> None:
    cluster.apply(VALUES)
    assert cluster.run("-sync")[0] == 0
    installed = cluster.schedules()
    assert set(installed) == {"icd", "legal"}
    form = installed["icd"]["runtime_config"]["parameters"]
    assert (form["output_uri"], form["method_seed"], form["schedule_max_attempts"]) == ("s3://bucket/camopd", "7", 3)
    assert installed["icd"]["service_account"] == "camopd"
    code, said = cluster.run("-test-kfp")
    assert code == 0, said
    assert "Nothing to do" in said

    running = cluster.api.tick(installed["legal"]["recurring_run_id"])
    begun = copy.deepcopy(cluster.api.runs[running])
    cluster.apply(VALUES | {"schedules": VALUES["schedules"][:1], "pools": VALUES["pools"] | {"cpu": {"memory": "5Gi"}}})
    code, said = cluster.run("-test-kfp")
    assert code == 3, said
    assert cluster.schedules() == installed, "a test changes nothing"
    assert cluster.run("-sync")[0] == 0
    assert set(cluster.schedules()) == {"icd"}
    assert len(cluster.api.versions) == 2
    assert cluster.api.runs[running] == begun
    assert installed["legal"]["recurring_run_id"] in cluster.api.recurring, "it would have taken its run along"

    cluster.apply(VALUES)
    assert cluster.run("-sync")[0] == 0
    assert {name: each["trigger"] for name, each in cluster.schedules().items()} == {
        name: each["trigger"] for name, each in installed.items()
    }
    assert len(cluster.api.versions) == 2, "the older version is there still"

    assert cluster.run("-remove")[0] == 0
    assert cluster.schedules() == {}
    assert cluster.api.runs[running] == begun
    assert len(cluster.api.versions) == 2


@pytest.mark.slow
def test_another_release_is_left_alone(cluster: Cluster) -> None:
    for release in ("camopd", "other"):
        cluster.apply(VALUES, release=release)
        assert cluster.run("-sync")[0] == 0
    assert len(cluster.api.recurring) == 4
    assert cluster.run("-remove")[0] == 0
    assert [re.findall(r"for (\S+):", each["description"])[0] for each in cluster.api.recurring.values()] == [
        "team-a/camopd"
    ] * 2


@pytest.mark.slow
def test_the_hooks_ask_for_what_their_role_allows_and_for_all_of_it(cluster: Cluster) -> None:
    def asked() -> set[tuple[str, str, str, str]]:
        found = set()
        for method, path in cluster.api.asked:
            place = path.partition("?")[0].removeprefix("/apis/v2beta1")
            if place == "/healthz":  # asks nobody
                continue
            (right,) = [(resource, verb) for m, form, resource, verb in ASKED if m == method and re.fullmatch(form, place)][:1]
            found.add(("pipelines.kubeflow.org", right[0], "", right[1]))
        return found

    cluster.apply(VALUES)
    cluster.run("-sync")
    cluster.api.recurring[cluster.schedules()["icd"]["recurring_run_id"]]["status"] = "DISABLED"  # by hand
    cluster.run("-sync")
    cluster.run("-remove")
    assert asked() == rights(one(cluster.objects, "Role", "camopd-sync"))


@pytest.mark.parametrize("name", NAMED)
def test_sync_takes_the_file_of_every_set_of_values(helm, tmp_path, name):
    (config,) = [entry for entry in helm.render(NAMED[name]) if entry["kind"] == "ConfigMap"]
    (tmp_path / "sync.json").write_text(config["data"]["sync.json"], encoding="utf-8")
    assert len(read(tmp_path / "sync.json").schedules) == len(NAMED[name].get("schedules", []))
