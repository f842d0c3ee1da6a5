"""Models that are named in a registry: found for real in an MLflow server, and the same run as by their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from camopd import prepare, workflow
from camopd.config import Recipe, Tracking, load_recipe
from camopd.errors import InputError, TrackingError
from camopd.inputs.registered import locate, resolve_models
from camopd.plan import Plan
from camopd.recipe.registered import Reference, check_registered, reference_of
from camopd.store import Store
from camopd.tracking import NullTracker, Tracker, tracker_for

MICRO = Path("examples/micro").absolute()


@pytest.fixture(autouse=True)
def _no_tracking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model() -> str:
    return f"icd-coder-{uuid4().hex[:8]}"


def tracker_at(uri: str) -> Tracker:
    return tracker_for(Tracking(uri=uri, experiment="registered"))


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def register(uri: str, model: str, source: str, tags: dict[str, str] | None = None, run_id: str | None = None) -> int:
    """A version as a user would make it."""
    if not client(uri).search_registered_models(f"name = '{model}'"):
        client(uri).create_registered_model(model)
    return int(client(uri).create_model_version(model, source, run_id, tags, await_creation_for=0).version)


# --- Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("models:/icd-coder@latest-tuned", Reference("icd-coder", alias="latest-tuned")),
        ("models:/icd-coder/7", Reference("icd-coder", version=7)),
        ("models:/icd-coder#stage=ready", Reference("icd-coder", tag=("stage", "ready"))),
        ("models:/a@b@c", Reference("a@b", alias="c")),
        ("models:/icd#when=a=b@c/d", Reference("icd", tag=("when", "a=b@c/d"))),
    ],
)
def test_a_name_says_which_version_is_meant(text: str, meant: Reference) -> None:
    assert reference_of(text) == meant


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models:/icd-coder", "which version"),
        ("models:/icd-coder@", "which version"),
        ("models:/icd-coder/Production", "no version"),
        ("models:/icd-coder/latest", "'latest' are not followed"),
        ("models:/icd-coder/0", "no version"),
        ("models:/icd-coder#ready", "tag=value"),
        ("models:/#a=b", "tag=value"),
        ("models://icd-coder@a", "names no registered model"),
        ("models:/@a", "which version"),
    ],
)
def test_what_says_less_is_refused_with_the_forms(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_registered(text)


def test_only_models_may_be_named_so() -> None:
    text = 'student = "./d"\nbranches = [{name = "g", role = "recover", teacher = "models:/g/1", prompts = "models:/p/1"}]\n'
    with pytest.raises(InputError) as caught:
        load_recipe(text, {"input_domain_model_uri": "models:/d", "output_uri": "models:/out/1"})
    assert len(caught.value.problems) == 3
    assert "input_domain_model_uri: 'models:/d' does not say which version" in str(caught.value)


def test_what_prepare_writes_is_not_for_people() -> None:
    text = (
        'student = "./d"\nsources = {student = "models:/d/1"}\nbranches = [{name = "g", role = "recover", prompts = "./p"}]\n'
    )
    with pytest.raises(InputError, match=r"recipe:2 \(sources\): tells where models came from, and is written by prepare"):
        load_recipe(text)


# --- In a registry --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "server"])
def test_a_version_is_found_by_alias_number_and_tag(kind: str, model: str, request: pytest.FixtureRequest) -> None:
    uri, store = request.getfixturevalue(f"mlflow_{kind}"), Store()
    for number in (1, 2, 3):
        assert register(uri, model, f"s3://models/icd/{number}", {"stage": "ready" if number < 3 else "draft"}) == number
    client(uri).set_registered_model_alias(model, "tuned", "1")
    tracker = tracker_at(uri)
    s3 = _Nothing()
    found = {form: locate(f"models:/{model}{form}", tracker, s3) for form in ("@tuned", "/3", "#stage=ready")}
    assert {form: at.uri for form, at in found.items()} == {
        "@tuned": "s3://models/icd/1",
        "/3": "s3://models/icd/3",
        "#stage=ready": "s3://models/icd/2",
    }
    assert found["#stage=ready"].source == f"models:/{model}/2"
    for form, words in {
        "@other": "no alias 'other' (its versions are 1 to 3)",
        "/9": "no version 9",
        "#stage=gone": "no version with the tag stage = 'gone'",
    }.items():
        with pytest.raises(TrackingError) as caught:
            locate(f"models:/{model}{form}", tracker, s3)
        assert words in str(caught.value)
    with pytest.raises(TrackingError, match="has no version of a model 'nobody'; check its spelling"):
        locate("models:/nobody@tuned", tracker, store)


class _Nothing(Store):
    """A store in which nothing lies: for sources that nobody looks into."""

    def stat(self, uri: str) -> None:
        return None


@pytest.mark.slow
def test_a_version_that_is_not_ready_is_not_taken_by_its_tag_and_refused_by_its_number(mlflow_sqlite: str, model: str) -> None:
    for number in (1, 2):
        register(mlflow_sqlite, model, f"s3://models/icd/{number}", {"stage": "ready"})
    import sqlite3

    with sqlite3.connect(mlflow_sqlite.removeprefix("sqlite:///")) as database:
        changed = database.execute("UPDATE model_versions SET status = 'PENDING_REGISTRATION' WHERE version = 2")
    assert changed.rowcount == 1
    tracker = tracker_at(mlflow_sqlite)
    assert locate(f"models:/{model}#stage=ready", tracker, _Nothing()).uri == "s3://models/icd/1"
    with pytest.raises(TrackingError, match="is not READY"):
        locate(f"models:/{model}/2", tracker, _Nothing())


@pytest.mark.slow
def test_our_own_versions_are_followed(mlflow_server: str, model: str, tmp_path: Path) -> None:
    """A server refuses a folder as a source: there it is an artifact of the run, and the tag names the folder."""
    shutil.copytree(MICRO / "domain", tmp_path / "model")
    run = client(mlflow_server).create_run("0").info.run_id
    client(mlflow_server).log_text(run, "{}", "checkpoint/checkpoint.json")
    register(mlflow_server, model, f"runs:/{run}/checkpoint", {"camopd.checkpoint_uri": str(tmp_path / "model")}, run_id=run)
    assert locate(f"models:/{model}/1", tracker_at(mlflow_server), Store()).uri == str(tmp_path / "model")
    register(mlflow_server, model, f"runs:/{run}/checkpoint", run_id=run)
    with pytest.raises(TrackingError, match=r"behind the tracking server, .*create_model_version\('icd-coder-"):
        locate(f"models:/{model}/2", tracker_at(mlflow_server), Store())


@pytest.mark.slow
def test_a_model_that_mlflow_logged_is_taken_where_it_is_whole(
    mlflow_sqlite: str, s3_prefix: str, s3_server, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLflow 3's ``models:/m-...`` and ``runs:/`` sources, with artifacts on S3, followed to where they are.

    Logged as a folder, the model is whole below ``model/``; logged as objects, its tokenizer is elsewhere.
    """
    import mlflow
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_sqlite)
    objects = {
        "model": AutoModelForCausalLM.from_pretrained(MICRO / "domain"),
        "tokenizer": AutoTokenizer.from_pretrained(MICRO / "domain"),
    }
    mlflow.transformers.save_model(objects, str(tmp_path / "apart"), task="text-generation", pip_requirements=["transformers"])
    # From a folder MLflow 3.17 saves all of it below model/; with transformers 5 it does not get that far.
    shutil.copytree(MICRO / "domain", tmp_path / "whole" / "model")
    shutil.copyfile(tmp_path / "apart" / "MLmodel", tmp_path / "whole" / "MLmodel")
    experiment = client(mlflow_sqlite).create_experiment("logged", artifact_location=f"{s3_prefix}/mlflow")
    for name in ("whole", "apart"):
        logged = client(mlflow_sqlite).create_logged_model(experiment, name=name)
        client(mlflow_sqlite).log_model_artifacts(logged.model_id, str(tmp_path / name))
        client(mlflow_sqlite).finalize_logged_model(logged.model_id, "READY")
        assert logged.model_uri.startswith("models:/m-")
        register(mlflow_sqlite, model, logged.model_uri)
    run = client(mlflow_sqlite).create_run(experiment)
    client(mlflow_sqlite).log_artifacts(run.info.run_id, str(tmp_path / "whole"), "of-a-run")
    register(mlflow_sqlite, model, f"runs:/{run.info.run_id}/of-a-run", run_id=run.info.run_id)

    tracker, store = tracker_at(mlflow_sqlite), Store()
    for number in (1, 3):
        found = locate(f"models:/{model}/{number}", tracker, store)
        assert found.uri.startswith(f"{s3_prefix}/mlflow/")
        assert found.uri.endswith("/model")
        fetched = store.fetch(found.uri) / "model.safetensors"
        assert fetched.read_bytes() == (MICRO / "domain" / "model.safetensors").read_bytes()
    with pytest.raises(TrackingError, match=r"is an MLflow model folder .*register the folder that save_pretrained wrote"):
        locate(f"models:/{model}/2", tracker, store)


def test_without_a_registry_it_is_said_which_setting_is_missing(tmp_path: Path) -> None:
    resolved = resolve_models(recipe_of(tmp_path, student="models:/a@b"), NullTracker(), Store())
    (problem,) = resolved.problems
    assert str(problem) == "student: models:/a@b names a registered model, and no registry is known; set MLFLOW_TRACKING_URI"


# --- In a run -------------------------------------------------------------------------------------------------------------


def recipe_of(tmp_path: Path, **settings: Any) -> Recipe:
    return load_recipe("recipes/micro.toml", {"output": str(tmp_path / "runs"), **settings})


@pytest.mark.slow
def test_the_same_content_under_another_name_is_the_same_run(
    mlflow_server: str, s3_prefix: str, s3_server, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its manifest's content id: a checkpoint on S3, by place and by each name, and what is recorded of which."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    store = Store()
    store.produce(
        f"{s3_prefix}/domain",
        stage="train",
        config={},
        inputs={},
        write=lambda folder: shutil.copytree(MICRO / "domain", folder, dirs_exist_ok=True) and {},
    )
    for _ in range(2):
        register(mlflow_server, model, f"{s3_prefix}/domain", {"stage": "ready"})
    client(mlflow_server).set_registered_model_alias(model, "tuned", "1")
    parameters = {"output": str(tmp_path / "runs"), "tracking.experiment": model}
    by_place = workflow.prepare("micro", {**parameters, "student": f"{s3_prefix}/domain"}, store=store)
    by_alias = workflow.prepare("micro", {**parameters, "student": f"models:/{model}@tuned"}, store=store)
    recipe = Plan.load(store, by_alias.uri).recipe
    assert (recipe.student, recipe.sources) == (f"{s3_prefix}/domain", {"student": f"models:/{model}/1"})
    by_tag = workflow.prepare(
        "micro",
        {**parameters, "student": f"models:/{model}#stage=ready", "branches.domain.teacher": f"models:/{model}/1"},
        store=store,
    )
    assert by_place.uri == by_alias.uri == by_tag.uri
    recorded = json.loads(store.read(f"{by_tag.uri}/recipe.json"))
    assert recorded["sources"] == {"student": f"models:/{model}/2", "teacher/domain": f"models:/{model}/1"}
    assert f"| sources.student | models:/{model}/2 |" in by_tag.document
    experiment = client(mlflow_server).get_experiment_by_name(model)
    (run,) = client(mlflow_server).search_runs([experiment.experiment_id])
    assert run.data.tags["camopd.source.student"] == f"models:/{model}/2"
    assert run.data.tags["camopd.source.teacher/domain"] == f"models:/{model}/1"
    assert "sources.student" not in run.data.params


@pytest.mark.slow
def test_a_name_that_cannot_be_found_stands_among_all_problems(mlflow_sqlite: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_sqlite)
    named = {"student": "models:/nobody@tuned", "base": "models:/nothing/3", "branches.general.teacher": "models:/nobody@tuned"}
    with pytest.raises(InputError) as caught:
        workflow.prepare("micro", {"output": str(tmp_path), **named, "branches.domain.prompts": str(tmp_path / "none.jsonl")})
    where = [problem.where for problem in caught.value.problems]
    assert where[:3] == ["student", "base", "branches.domain.prompts"]
    assert "models:/nobody" not in " ".join(str(problem) for problem in caught.value.problems[2:])


def test_who_submits_a_named_model_is_told_what_the_registry_says(tmp_path: Path) -> None:
    """Before anything is uploaded, and among what else is wrong."""
    from camopd.kubeflow.checks import check_inputs
    from camopd.kubeflow.form import Wish

    recipe = recipe_of(tmp_path, student="models:/icd-coder@tuned", **{"branches.domain.prompts": str(tmp_path / "none.jsonl")})
    with pytest.raises(InputError) as caught:
        check_inputs(Wish(recipe, recipe, {}, shipped=False), [], Store())
    assert [problem.where for problem in caught.value.problems][:2] == ["student", "branches.domain.prompts"]
    assert "models:/icd-coder@tuned names a registered model, and no registry is known" in str(caught.value)


def test_an_adapter_waits_for_a_base_that_was_not_found(tmp_path: Path) -> None:
    """What is said of the base is enough: nobody looks for files below its name."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    recipe = recipe_of(tmp_path, student=str(adapter), base="models:/base@x")
    ids, problems = prepare.resolve(recipe, Store())
    assert "student" not in ids
    assert problems == []


def test_the_plan_of_a_named_model_says_that_it_does_not_ask(tmp_path: Path) -> None:
    from camopd.estimate.sources import model_shapes

    _, origins = model_shapes(recipe_of(tmp_path, student="models:/icd-coder@tuned"), {})
    assert origins["student"] == "in the registry, which is not asked here: taken as general"
