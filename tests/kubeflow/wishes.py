"""Recipes and pipelines to submit, and the server's side of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kfp as sdk
import yaml

from tests.fixtures.kfp_api import KfpApi
from tests.kubeflow.conftest import ROOT

COMPILED = ROOT / "pipelines" / "recovery.yaml"
RECIPE = """\
# the domain model of tonight
name = "tonight"
student = "s3://models/domain"
output = "s3://models/runs"
num_rounds = 3

[[branches]]
name = "general"
role = "recover"
teacher = "s3://models/general"
prompts = "s3://models/general.jsonl"
tasks = ["gsm8k"]

[[branches]]
name = "domain"
role = "retain"
prompts = "s3://models/domain.jsonl"
tasks = ["codes"]
"""


def recipe_file(folder: Path, text: str = RECIPE) -> str:
    path = folder / "tonight.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def changed_pipeline(folder: Path, change: Any) -> Path:
    """The compiled pipeline with another content: ``change`` gets the spec as parsed."""
    spec = yaml.safe_load(COMPILED.read_text())
    change(spec)
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path


def upload(api: KfpApi, file: Path = COMPILED, name: str = "v1", **options: Any) -> str:
    """Have a version on the server, as the platform's engineer would; returns its id."""
    client = sdk.Client(host=api.host, namespace=options.pop("namespace", "kubeflow"), **options)
    pipelines = [each["pipeline_id"] for each in api.pipelines.values()]
    if not pipelines:
        made = client._pipelines_api.pipeline_service_create_pipeline({"name": "camopd-recovery"})
        pipelines = [made.pipeline_id]
    return str(client.upload_pipeline_version(str(file), name, pipeline_id=pipelines[0]).pipeline_version_id)


def the_run(api: KfpApi) -> dict[str, Any]:
    (run,) = api.runs.values()
    return run


def form_of(api: KfpApi) -> dict[str, Any]:
    return dict(the_run(api)["runtime_config"]["parameters"])
