"""`camopd submit` against the API server: what is asked for arrives, and what is wrong never leaves."""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from camopd.config import load_recipe
from camopd.kubeflow import checks, form
from camopd.store import Store
from tests.fixtures.kfp_api import KfpApi
from tests.fixtures.s3 import S3Server
from tests.integration.test_cluster_like import MICRO, small_recipe
from tests.integration.test_cluster_like import upload as upload_folder
from tests.kubeflow.conftest import ROOT
from tests.kubeflow.wishes import COMPILED, RECIPE, changed_pipeline, form_of, recipe_file, the_run, upload

Camopd = Callable[..., tuple[int, str]]
QUICK = ("--no-watch", "--preflight", "recipe")


def asked(api: KfpApi, *arguments: str) -> list[str]:
    return ["submit", *arguments, *QUICK, "--host", api.host]


def refused(camopd: Camopd, api: KfpApi, *arguments: str) -> str:
    """What is printed when nothing is to be started or uploaded."""
    before = (len(api.versions), len(api.experiments), len(api.runs))
    code, said = camopd(*arguments)
    assert code == 1
    assert (len(api.versions), len(api.experiments), len(api.runs)) == before
    return said


def test_a_run_of_the_newest_version(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    upload(kfp, name="v1")
    newest = upload(kfp, changed_pipeline(tmp_path, lambda spec: spec["pipelineInfo"].update(description="newer")), "v2")
    recipe = recipe_file(tmp_path)
    code, said = camopd(*asked(kfp, recipe, "-s", "seed=2", "-s", "output_promote=false", "--service-account", "runner"))
    assert code == 0
    run = the_run(kfp)
    assert run["run_id"] in said
    assert f"{kfp.host}/#/runs/details/{run['run_id']}" in said
    assert run["pipeline_version_reference"]["pipeline_version_id"] == newest
    assert (run["service_account"], kfp.experiments[run["experiment_id"]]["display_name"]) == ("runner", "camopd")
    assert re.fullmatch(r"tonight-\d{8}-\d{6}", run["display_name"])
    form = {"input_recipe": RECIPE, "output_uri": "s3://models/runs", "method_seed": "2", "output_promote": False}
    assert form_of(kfp) == form


def test_other_values_are_written_into_the_text(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    upload(kfp)
    values = {
        "train.lora.rank": "8",
        "branches.general.mass": "0.7",
        "evaluate.task_dir": "s3://models/tasks",
        "notes": 'say "ä"\n\\',
    }
    settings = [part for item in values.items() for part in ("-s", "=".join(item))]
    code, said = camopd(*asked(kfp, recipe_file(tmp_path), *settings))
    assert code == 0, said
    form = form_of(kfp)
    assert form["output_notes"] == values.pop("notes")  # the form has a field for it
    assert load_recipe(form["input_recipe"], {}) == load_recipe(RECIPE, values)


def test_the_compiled_file_is_uploaded_once(kfp: KfpApi, camopd: Camopd, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_file(tmp_path)
    code, said = camopd(*asked(kfp, recipe))
    assert code == 0
    (version,) = kfp.versions.values()
    assert re.fullmatch(r"sha256-[0-9a-f]{12}", version["name"])
    assert f"Uploading camopd-recovery, version {version['name']}" in said
    camopd(*asked(kfp, recipe, "--pipeline", str(COMPILED)))
    assert len(kfp.versions) == 1
    changed = changed_pipeline(tmp_path, lambda spec: spec["pipelineInfo"].update(description="mine"))
    code, said = camopd(*asked(kfp, recipe, "--pipeline", str(changed)))
    assert code == 0
    assert len(kfp.versions) == 2
    assert [run["pipeline_version_reference"]["pipeline_version_id"] for run in kfp.runs.values()][-1] == list(kfp.versions)[-1]
    assert len(kfp.pipelines) == 1


def test_two_upload_the_same_at_once(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    """Another takes the name between our look and our upload: its version is ours."""
    camopd(*asked(kfp, recipe_file(tmp_path)))
    (version,) = kfp.versions.values()
    kfp.versions.clear()

    def before(method: str, path: str) -> None:
        if path.endswith("/upload_version"):
            kfp.versions[version["pipeline_version_id"]] = version

    kfp.before = before
    code, _ = camopd(*asked(kfp, recipe_file(tmp_path), "--pipeline", str(COMPILED)))
    assert code == 0
    assert [run["pipeline_version_reference"]["pipeline_version_id"] for run in kfp.runs.values()] == 2 * [
        version["pipeline_version_id"]
    ]


@pytest.mark.slow
def test_pools_are_compiled_and_uploaded(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    upload(kfp)
    pools = tmp_path / "pools.toml"
    pools.write_text('[all.env]\nCAMOPD_OUTPUT = "s3://cluster/runs"\nMLFLOW_TRACKING_URI = "http://mlflow.ml:5000"\n')
    recipe = recipe_file(tmp_path, RECIPE.replace('output = "s3://models/runs"\n', ""))
    code, said = camopd(*asked(kfp, recipe, "--pools", str(pools)))
    assert code == 0, said
    assert form_of(kfp)["output_uri"] == "s3://cluster/runs"  # what the pods are told
    assert "MLflow:   http://mlflow.ml:5000" in said
    pools.write_text('[gpu]\nimage = "x"\n')
    assert "pools.toml: gpu" in refused(camopd, kfp, *asked(kfp, recipe, "--pools", str(pools)))


def test_a_shipped_recipe_has_its_files_in_the_image(kfp: KfpApi, camopd: Camopd) -> None:
    upload(kfp)
    code, said = camopd(*asked(kfp, "micro", "-s", "output_uri=s3://models/runs"))
    assert code == 0, said
    sent = tomllib.loads(form_of(kfp)["input_recipe"])
    assert sent["student"] == "/app/examples/micro/domain"
    assert sent["evaluate"]["task_dir"] == "/app/examples/micro/tasks"
    assert form_of(kfp)["output_uri"] == "s3://models/runs"


# --- Refused ---------------------------------------------------------------------------------------------------------------


def test_every_problem_at_once(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    upload(kfp)
    text = RECIPE.replace('s3://models/domain"', '/models/domain"').replace("s3://models/general.jsonl", "./general.jsonl")
    text = text.replace('"s3://models/runs"', '"runs"'.replace("runs", "./runs")) + '\n[prompts]\nchat_template = "~/t.jinja"\n'
    text = text.replace('name = "tonight"', 'name = "tonight"\nnotes = "{{x}}"').replace("num_rounds = 3", "num_rounds = 400")
    said = refused(camopd, kfp, *asked(kfp, recipe_file(tmp_path, text)))
    for parameter in ("student", "prompts.chat_template", "branches.general.prompts"):
        assert re.search(rf"\d\. {re.escape(parameter)}: \S+ is on this machine, and pods share no disk", said), parameter
    assert f"output_uri: {tmp_path}/runs is a folder of this machine" in said
    assert "-s output_uri=s3://" in said
    assert "num_rounds: 400 rounds are" in said
    assert re.search(r"recipe:\d+: holds \{\{", said)
    assert "6 problems found, nothing was started" in said


def test_what_the_recipe_says_wrong_keeps_its_line(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    upload(kfp)
    recipe = recipe_file(tmp_path, RECIPE.replace("num_rounds = 3", "num_rounds = 0"))
    said = refused(camopd, kfp, *asked(kfp, recipe, "-s", "method_name=camopdd", "-s", "branches.general.maas=1"))
    assert "tonight.toml:5 (num_rounds)" in said
    assert "method_name: there is no method 'camopdd'" in said
    assert "did you mean 'branches.general.mass'?" in said


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("output_promote=perhaps", "output_promote: true or false is expected, not 'perhaps'"),
        ("input_recipe=micro", "input_recipe: is the recipe itself"),
        ("method_sed=2", "did you mean 'method_seed'?"),
        ("notes=see {{x}}", "notes: holds {{, which Argo"),
    ],
)
def test_a_value_that_does_not_fit_the_form(kfp: KfpApi, camopd: Camopd, tmp_path: Path, value: str, part: str) -> None:
    upload(kfp)
    assert part in refused(camopd, kfp, *asked(kfp, recipe_file(tmp_path), "-s", value))


def test_a_form_that_is_older(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    def older(spec: dict[str, Any]) -> None:
        del spec["root"]["inputDefinitions"]["parameters"]["output_notes"]

    upload(kfp, changed_pipeline(tmp_path, older))
    said = refused(camopd, kfp, *asked(kfp, recipe_file(tmp_path), "-s", "output_notes=hello"))
    assert "output_notes: the pipeline on the server is older and its run form has no such field -> say notes" in said
    assert camopd(*asked(kfp, recipe_file(tmp_path), "-s", "notes=hello"))[0] == 0
    assert load_recipe(form_of(kfp)["input_recipe"], {}).notes == "hello"


def test_an_engine_that_the_image_has_not(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    upload(kfp)
    recipe = recipe_file(tmp_path, RECIPE + '\n[rollout]\nengine = "vllm"\n')
    assert re.search(
        r"rollout\.engine: engine vllm, .* pool inference runs the image \S+/trainer:",
        refused(camopd, kfp, *asked(kfp, recipe)),
    )

    def with_vllm(spec: dict[str, Any]) -> None:
        spec["deploymentSpec"]["executors"]["exec-rollout"]["container"]["image"] = (
            "registry.example.org/camopd/inference:0.1.0"
        )

    upload(kfp, changed_pipeline(tmp_path, with_vllm), "v2")
    assert camopd(*asked(kfp, recipe))[0] == 0


def test_a_pipeline_of_somebody_else(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    assert "no pipeline 'other'" in refused(camopd, kfp, *asked(kfp, recipe, "--pipeline", "other"))

    def other(spec: dict[str, Any]) -> None:
        del spec["root"]["inputDefinitions"]["parameters"]["input_recipe"]

    said = refused(camopd, kfp, *asked(kfp, recipe, "--pipeline", str(changed_pipeline(tmp_path, other))))
    assert "its run form has no input_recipe, so it is not camopd's" in said
    (tmp_path / "no.yaml").write_text("a: 1\n")
    assert "is no compiled pipeline" in refused(camopd, kfp, *asked(kfp, recipe, "--pipeline", str(tmp_path / "no.yaml")))


# --- Many users ------------------------------------------------------------------------------------------------------------


def test_many_users(kfp_teams: KfpApi, camopd: Camopd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_file(tmp_path)
    shared = upload(kfp_teams, namespace="team-a", existing_token="token-admin")  # in no namespace: everybody's
    monkeypatch.setenv("KFP_TOKEN", "token-a")
    assert "give --namespace" in refused(camopd, kfp_teams, *asked(kfp_teams, recipe))
    said = refused(camopd, kfp_teams, *asked(kfp_teams, recipe, "--namespace", "team-b"))
    assert "kubeflow-edit" in said
    code, said = camopd(*asked(kfp_teams, recipe, "--namespace", "team-a"))
    assert code == 0, said
    run = the_run(kfp_teams)
    assert run["pipeline_version_reference"]["pipeline_version_id"] == shared
    assert kfp_teams.experiments[run["experiment_id"]]["namespace"] == "team-a"
    # an upload goes to one's own namespace, which is looked at first from then on
    changed = changed_pipeline(tmp_path, lambda spec: spec["pipelineInfo"].update(description="ours"))
    code, said = camopd(*asked(kfp_teams, recipe, "--namespace", "team-a", "--pipeline", str(changed)))
    assert code == 0, said
    assert [pipeline.get("namespace", "") for pipeline in kfp_teams.pipelines.values()] == ["", "team-a"]
    # and what others have is not ours, though it be newer
    monkeypatch.setenv("KFP_TOKEN", "token-b")
    assert camopd(*asked(kfp_teams, recipe, "--namespace", "team-b"))[0] == 0
    assert list(kfp_teams.runs.values())[-1]["pipeline_version_reference"]["pipeline_version_id"] == shared


def test_pipelines_that_are_kept_as_kubernetes_objects(kfp_teams: KfpApi, camopd: Camopd, tmp_path: Path, monkeypatch) -> None:
    """There a list without a namespace has everybody's."""
    kfp_teams.store = "kubernetes"
    for team in ("a", "b"):
        monkeypatch.setenv("KFP_TOKEN", f"token-{team}")
        code, said = camopd(*asked(kfp_teams, recipe_file(tmp_path), "--namespace", f"team-{team}"))
        assert code == 0, said
    assert [pipeline["namespace"] for pipeline in kfp_teams.pipelines.values()] == ["team-a", "team-b"]


def test_pipelines_of_a_server_without_users_as_kubernetes_objects(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    kfp.store = "kubernetes"
    for _ in range(2):
        assert camopd(*asked(kfp, recipe_file(tmp_path)))[0] == 0
    assert [pipeline["namespace"] for pipeline in kfp.pipelines.values()] == ["kubeflow"]
    assert len(kfp.versions) == 1


def test_a_name_that_a_filter_could_spoil(kfp: KfpApi, camopd: Camopd, tmp_path: Path) -> None:
    upload(kfp)
    for _ in range(2):
        assert camopd(*asked(kfp, recipe_file(tmp_path), "--experiment", 'ICD+10 100% "ä"'))[0] == 0
    assert sorted(each["display_name"] for each in kfp.experiments.values()) == ["Default", 'ICD+10 100% "ä"']


def test_the_token_stays_out_of_sight(
    kfp_teams: KfpApi, camopd: Camopd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "token-of-nobody")
    _, said = camopd(*asked(kfp_teams, recipe_file(tmp_path), "--namespace", "team-a"))
    assert "(401)" in said
    assert "token-of-nobody" not in said


# --- The inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_of_prepares_checks_are_made_from_here(
    kfp: KfpApi, camopd: Camopd, tmp_path: Path, s3_server: S3Server, s3_prefix: str
) -> None:
    upload(kfp)
    upload_folder(MICRO, f"{s3_prefix}/micro", s3_server)
    text = small_recipe(s3_prefix)
    recipe = recipe_file(tmp_path, text)
    arguments = ("submit", recipe, "--no-watch", "--host", kfp.host)
    wrong = ("-s", f"student={s3_prefix}/micro/nothing", "-s", "evaluate.task_dir=/tmp/tasks")
    said = refused(camopd, kfp, *arguments, *wrong)
    assert f"student: {s3_prefix}/micro/nothing" in said
    assert "evaluate.task_dir: /tmp/tasks is on this machine" in said
    said = refused(camopd, kfp, *arguments, "-s", "branches.general.teacher=http://127.0.0.1:9/v1")
    assert re.search(r"branches\.general\.teacher: .*127\.0\.0\.1:9.*where only pods reach it: --preflight recipe", said)
    code, said = camopd(*arguments)
    assert code == 0, said
    assert form_of(kfp)["input_recipe"] == text
    assert [file.name for file in Store().list(f"{s3_prefix}/runs")] == []  # but for the probe, whose name is hidden
    relative = text.replace(f'"{s3_prefix}/', '"./')
    Store().write(f"{s3_prefix}/small.toml", relative.encode())
    assert camopd(*asked(kfp, f"{s3_prefix}/small.toml"))[0] == 0
    sent = list(kfp.runs.values())[-1]["runtime_config"]["parameters"]["input_recipe"]
    assert load_recipe(sent, {}) == load_recipe(text, {})
    code, said = camopd("submit", "micro", "-s", f"output_uri={s3_prefix}/runs", "--no-watch", "--host", kfp.host)
    assert code == 0, said


@pytest.mark.slow
def test_a_store_that_is_out_of_reach(kfp: KfpApi, camopd: Camopd, tmp_path: Path, s3_prefix: str, monkeypatch) -> None:
    upload(kfp)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    said = refused(camopd, kfp, "submit", recipe_file(tmp_path), "--no-watch", "--host", kfp.host)
    assert "cannot be checked from this machine" in said
    assert "--preflight recipe" in said
    assert camopd(*asked(kfp, recipe_file(tmp_path)))[0] == 0


def test_a_recipe_of_the_image_is_shipped_where_sync_runs_in_the_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(form, "IN_IMAGE", str(tmp_path))
    monkeypatch.setattr(
        form, "SHIPPED", Path("/opt/camopd/lib/python3.11/recipes")
    )  # beside an installed package there are none
    monkeypatch.setattr(checks, "EXAMPLES", f"{tmp_path}/examples/")
    spec = next(yaml.safe_load_all(COMPILED.read_text(encoding="utf-8")))
    wanted = form.wish("micro", {"output_uri": "s3://models/runs"}, spec, store=Store())
    assert wanted.shipped
    assert wanted.sent.student == f"{tmp_path}/examples/micro/domain"
    assert checks.problems_of(wanted, spec) == []


def test_the_shipped_recipes_are_those_of_the_checkout() -> None:
    from camopd.recipe.document import SHIPPED

    assert ROOT / "recipes" == SHIPPED
