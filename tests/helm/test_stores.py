"""What `helm test` tries of the stores, with the variables that pods of runs are given, against real servers."""

from __future__ import annotations

import os
from typing import Any

import pytest
from typer.testing import CliRunner

from camopd.cli import app
from tests.fixtures.s3 import ACCESS_KEY, REGION, SECRET_KEY, S3Server
from tests.helm.conftest import Helm, env_of, pods_in

SECRETS = {"camopd-s3": {"access-key": ACCESS_KEY, "secret-key": SECRET_KEY}}  # as somebody has made them in the namespace


@pytest.mark.slow
def test_the_variables_of_a_run_lead_to_store_and_registry(
    helm: Helm, s3_server: S3Server, s3_prefix: str, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {
        "output": f"{s3_prefix}/runs",
        "s3": {"endpoint": s3_server.endpoint, "region": REGION, "existingSecret": {"name": "camopd-s3"}},
        "mlflow": {"trackingUri": mlflow_server},
    }
    pod = pods_in(helm.render(values))["camopd-test-stores"]
    for name in [name for name in os.environ if name.startswith(("AWS_", "S3_", "MLFLOW_", "CAMOPD_OUTPUT"))]:
        monkeypatch.delenv(name)
    for entry in env_of(pod):
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        monkeypatch.setenv(entry["name"], SECRETS[reference["name"]][reference["key"]] if reference else entry["value"])
    told = CliRunner().invoke(app, pod["spec"]["containers"][0]["command"][1:])
    assert told.exit_code == 0, told.output
    assert told.output.splitlines() == [
        f"Output {s3_prefix}/runs: written and read back",
        f"MLflow {mlflow_server}: answers, the registry too",
    ]
