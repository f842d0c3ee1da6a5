"""The chart, rendered by Helm itself, 4 and 3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "camopd"
TOOLS = ROOT / ".cache" / "helm"
NAMED = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in Path(__file__).parent.glob("values/*.yaml")}
NAMED["default"] = {}
Object = dict[str, Any]


@dataclass(frozen=True)
class Helm:
    """One version of Helm, without a cluster and without anybody's settings.

    Attributes:
        program: the executable.
        folder: where it may write.
    """

    program: Path
    folder: Path

    def run(self, *arguments: str | Path, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        file = self.folder / "values.json"  # not YAML: Go reads a plain 2e-6 as a number, PyYAML writes the text so
        file.write_text(json.dumps(values or {}), encoding="utf-8")
        environment = {"HOME": str(self.folder), "PATH": os.environ["PATH"], "KUBECONFIG": os.devnull}
        command = [str(self.program), *map(str, arguments), "--values", str(file)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def text(
        self, values: Mapping[str, Any] | None = None, *, release: str = "camopd", namespace: str = "ml", chart: Path = CHART
    ) -> str:
        """The rendered manifests, those of hooks and tests included."""
        done = self.run("template", release, chart, "--namespace", namespace, values=values)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def render(self, values: Mapping[str, Any] | None = None, **options: Any) -> list[Object]:
        return [document for document in yaml.safe_load_all(self.text(values, **options)) if document]

    def refused(self, values: Mapping[str, Any]) -> str:
        """Why Helm does not render these values, in one line."""
        done = self.run("template", "camopd", CHART, values=values)
        assert done.returncode != 0, "was rendered"
        return " ".join(done.stderr.split())

    def notes(self, values: Mapping[str, Any] | None = None) -> str:
        """What `helm install` tells at its end."""
        done = self.run("install", "nightly", CHART, "--namespace", "ml", "--dry-run=client", values=values)
        assert done.returncode == 0, done.stderr
        return done.stdout.partition("NOTES:\n")[2]


@pytest.fixture(scope="session")
def tools() -> Path:
    """The folder with Helm and the validator, which `make` and the first test put there."""
    if not (TOOLS / ".ready").exists():
        subprocess.run(["bash", ROOT / "scripts" / "setup_helm.sh", sys.executable, TOOLS], cwd=ROOT, check=True)
    return TOOLS


@pytest.fixture
def helm(tools: Path, tmp_path: Path) -> Helm:
    return Helm(tools / "helm", tmp_path)


@pytest.fixture(params=["helm", "helm3"])
def each_helm(tools: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Helm:
    return Helm(tools / request.param, tmp_path)


def one(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [entry for entry in objects if (entry["kind"], entry["metadata"]["name"]) == (kind, name)]
    return found


def pod_of(entry: Object) -> Object:
    """Metadata and spec of the pod that an object is or makes."""
    return entry if entry["kind"] == "Pod" else entry["spec"]["template"]


def pods_in(objects: list[Object]) -> dict[str, Object]:
    """Pods by the name of what makes them."""
    return {entry["metadata"]["name"]: pod_of(entry) for entry in objects if entry["kind"] in ("Pod", "Job")}


def env_of(pod: Object) -> list[Object]:
    """The variables of the pod's one container."""
    (container,) = pod["spec"]["containers"]
    return container.get("env", [])


def rights(role: Object) -> set[tuple[str, str, str, str]]:
    """Group, resource, name or nothing, and verb of everything that a role allows."""
    return {
        (group, resource, name, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
        for verb in rule["verbs"]
    }
