"""The compiled pipeline on s3:// URIs against a real S3 server, logging over HTTP to a real MLflow server."""

import json
import re
from pathlib import Path

import mlflow
import pytest

from camopd import plan as layout
from camopd.export import export_uri
from camopd.plan import Plan
from camopd.promote import release_uri
from camopd.store import Store
from pipelines.runner import run_compiled
from tests.fixtures.s3 import S3Server
from tests.integration.runs import ROOT, SMALL, camopd, the_run, weights

pytestmark = pytest.mark.slow
MICRO = ROOT / "examples" / "micro"


def upload(folder: Path, uri: str, server: S3Server) -> None:
    """Put a folder below an s3:// prefix, as a user would with any tool: no manifest of ours."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            server.client().upload_file(str(path), bucket, f"{key}/{path.relative_to(folder).as_posix()}")


def small_recipe(prefix: str) -> str:
    """The micro recipe, cut short, with everything on S3, and a gate that a short run can pass."""
    text = (
        (ROOT / "recipes" / "micro.toml")
        .read_text()
        .replace('"../examples/', f'"{prefix}/')
        .replace('"../runs"', f'"{prefix}/runs"')
    )
    for key, value in {"num_rounds": 2, "steps_per_round": 4, "prompts_per_step": 12}.items():
        text, found = re.subn(rf"^{key} = \d+", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1, key
    text = text.replace("[evaluate]", "[evaluate]\nlimit = 12\ncurve_points = 0\nbootstrap = 200")
    return text.replace("[gate]\nmin_retained = 0.9", "[gate]\nmin_recovered = -9\nmin_retained = 0")


def test_the_compiled_pipeline_on_s3_with_mlflow_over_http(s3_server, s3_prefix, mlflow_server, tmp_path, monkeypatch) -> None:
    upload(MICRO, f"{s3_prefix}/micro", s3_server)
    store = Store()
    store.write(f"{s3_prefix}/small.toml", small_recipe(s3_prefix).encode())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    run_compiled({"input_recipe": f"{s3_prefix}/small.toml", "output_model_name": "on-s3"}, root=tmp_path / "kfp")

    (name,) = {file.name.split("/")[0] for file in store.list(f"{s3_prefix}/runs") if file.name.endswith("/recipe.json")}
    run_uri = f"{s3_prefix}/runs/{name}"
    plan = Plan.load(store, run_uri)
    exported = export_uri(release_uri(plan, store))
    assert not store.verify(exported, deep=True)

    client = mlflow.MlflowClient(mlflow_server)
    assert client.get_model_version_by_alias("on-s3", "champion").source == exported
    experiment = client.get_experiment_by_name("camopd")
    (parent,) = client.search_runs([experiment.experiment_id], f"tags.`camopd.run_id` = '{name}'")
    nested = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert sorted(run.data.tags["camopd.round"] for run in nested) == ["1", "2"]
    assert any(file.path.endswith("report.html") for file in client.list_artifacts(parent.info.run_id))

    # The same content on a local disk gives the same weights: locations never shape them.
    camopd("run", "micro", settings=SMALL | {"output": str(tmp_path / "local")})
    assert weights(run_uri, store) == weights(the_run(str(tmp_path / "local")))


def test_three_branches_with_two_domain_teachers(tmp_path, monkeypatch) -> None:
    """A second domain is one more entry: another teacher, prompts and tasks of its own, and a share at the gate."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prompts = (MICRO / "prompts" / "general.jsonl").read_text().splitlines()[:40]
    (tmp_path / "style.jsonl").write_text("\n".join(line.replace('"id": "', '"id": "style-') for line in prompts) + "\n")
    recipe = (ROOT / "recipes" / "micro.toml").read_text().replace('"../', f'"{ROOT}/')
    recipe = recipe.replace(
        "[rollout]",
        f'[[branches]]\nname = "style"\nrole = "retain"\nteacher = "{MICRO}/general"\nprompts = "{tmp_path}/style.jsonl"\n'
        'tasks = ["micro_seen"]\nmass = 1.0\n\n[rollout]',
    )
    (tmp_path / "three.toml").write_text(recipe)
    one_cycle = {"output": str(tmp_path / "runs"), "num_rounds": "1", "steps_per_round": "5"}
    camopd("run", str(tmp_path / "three.toml"), settings=SMALL | one_cycle)
    run_uri, store = the_run(str(tmp_path / "runs")), Store()
    (round_uri,) = Plan.load(store, run_uri).rounds
    steps = json.loads(store.read(f"{layout.checkpoint_uri(round_uri)}/steps.json"))
    assert [list(step["branches"]) for step in steps] == [["general"]] * 3 + [["domain"], ["style"]]
    summary = json.loads(store.read(f"{layout.select_uri(round_uri)}/summary.json"))
    assert summary["style"]["num_kept"] == summary["style"]["num_samples"]  # mass = 1
    (evaluation,) = (f for f in store.list(f"{run_uri}/evaluation") if f.name.endswith("evaluation.json"))
    decided = json.loads(store.read(f"{run_uri}/evaluation/{evaluation.name}"))
    assert set(decided["retained"]) == {"domain", "style"}
    assert set(decided["recovered"]) == {"general"}
