"""What the chart writes is what `camopd sync` makes true, on a KFP API server with state."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from camopd.kubeflow import schedules, sync
from camopd.kubeflow.client import connect
from camopd.store import Store
from tests.fixtures.kfp_api import KfpApi, kfp, kfp_teams
from tests.helm.conftest import NAMED, Helm
from tests.helm.test_configmap import sync_file

__all__ = ["kfp", "kfp_teams"]


def synced(api: KfpApi, helm: Helm, values: dict, folder: Path) -> str:
    path = folder / "sync.json"
    path.write_text(json.dumps(sync_file(helm, values)))
    said: list[str] = []
    file = schedules.read(path)
    sync.sync(connect(api.host, file.namespace), file, store=Store(), say=said.append)
    return "\n".join(said)


def test_schedules_of_the_values_become_recurring_runs(kfp_teams, helm, tmp_path, monkeypatch):
    monkeypatch.setenv("KFP_TOKEN", "token-admin")
    monkeypatch.setattr(sync, "SETTLE_SECONDS", 0.0)
    values = copy.deepcopy(NAMED["full"])
    values["schedules"][1] |= {"recipe": "medical-8b"}  # which is off; the text there is no whole recipe
    kfp_teams.access["token-admin"].add("ml")
    text = synced(kfp_teams, helm, values, tmp_path)
    (made,) = kfp_teams.recurring.values()
    assert "schedule icd-coder: is created" in text
    assert made["namespace"] == "ml"
    assert made["description"].startswith("Kept by camopd sync for ml/camopd: schedule icd-coder, wish ")
    given = made["runtime_config"]["parameters"]
    assert (given["method_seed"], given["method_learning_rate"], given["output_promote"]) == ("12345678", "2e-6", True)
    assert given["output_uri"] == "s3://bucket/camopd", "the cluster's, said once in the values"
    assert "Nothing to do" in synced(kfp_teams, helm, values, tmp_path)


@pytest.mark.parametrize("name", ["default", "small"])
def test_without_schedules_the_pipeline_is_uploaded(kfp, helm, name, tmp_path):
    assert "is uploaded" in synced(kfp, helm, {**NAMED[name], "schedules": []}, tmp_path)
    assert not kfp.recurring
