"""What is promoted loads where people load it: transformers, PEFT and MLflow, from real servers; and says what it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from camopd import promote
from camopd.export import export_uri, released
from camopd.plan import TRAINER, Plan, checkpoint_uri
from camopd.promote import release_uri
from camopd.store import Store
from camopd.tracking import alias_snapshot
from tests.finished import STEPS, make_evaluation, make_plan, make_run
from tests.integration.runs import ROOT
from tests.registered import client, open_tracker
from tests.tiny import save_adapter

DOMAIN = ROOT / "examples/micro/domain"


@pytest.fixture(autouse=True)
def _no_tracking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store() -> Store:
    return Store()


def finish(output: str, store: Store, tracking_uri: str, model: Path, **settings: Any) -> tuple[Plan, str]:
    """Promote a run whose last checkpoint has the files of a model; returns the name of the registered model as well."""
    name, tracker = f"model-{uuid4().hex}", open_tracker(tracking_uri)
    plan = make_plan(output, store, num_rounds=1, student=str(DOMAIN), promote={"model_name": name}, **settings)
    alias_snapshot(plan.run_uri, store=store, tracker=tracker)

    def write(folder: Path) -> dict[str, float]:
        shutil.copytree(model, folder, dirs_exist_ok=True)
        (folder / TRAINER).mkdir()
        (folder / TRAINER / "optimizer.safetensors").write_bytes(b"moments" * 1000)
        (folder / "steps.json").write_text(json.dumps(STEPS))
        return {}

    store.produce(checkpoint_uri(plan.rounds[-1]), stage="train", config={}, inputs={}, write=write)
    make_evaluation(plan, store)
    assert promote.run(plan.run_uri, store=store, tracker=tracker).status == "promoted"
    return plan, name


# --- Which files ----------------------------------------------------------------------------------------------------------


def test_of_several_processes_every_part_goes_along_and_no_moments() -> None:
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    model = [*parts, "model.safetensors.index.json", "config.json", "tokenizer.json", "chat_template.jinja"]
    moments = [f"trainer/optimizer-0000{n}-of-00002.safetensors" for n in (1, 2)]
    found = released([*model, *moments, "trainer/state.json", "steps.json"], is_adapter=False)
    twice = {f"components/tokenizer/{name}": name for name in ("tokenizer.json", "chat_template.jinja")}
    assert found == {name: name for name in model} | twice


def test_an_adapter_goes_alone() -> None:
    files = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert released([*files, "trainer/optimizer.safetensors"], is_adapter=True) == {name: name for name in files}


# --- What it says ---------------------------------------------------------------------------------------------------------


def test_card_and_facts(tmp_path: Path, store: Store, mlflow_sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMOPD_IMAGE_DIGEST", "sha256:abc")
    monkeypatch.setenv("CAMOPD_GIT_SHA", "0123456789")
    version = {"student": "models:/icd-coder/7"}
    plan, name = finish(str(tmp_path / "runs"), store, mlflow_sqlite, DOMAIN, sources=version)
    assert client(mlflow_sqlite).get_model_version(name, "1").tags["camopd.source.student"] == "models:/icd-coder/7"
    folder = Path(export_uri(release_uri(plan, store)))
    assert not (folder / TRAINER).exists()
    facts = json.loads((folder / "camopd.json").read_text())
    assert plan.content_ids.items() <= facts["content_ids"].items()
    assert facts["content_ids"]["checkpoint"] == store.require(checkpoint_uri(plan.rounds[-1])).content_id
    assert (facts["software"]["git_sha"], facts["software"]["image_digest"]) == ("0123456789", "sha256:abc")
    assert facts["software"]["stages"]["train"]["image_digest"] == "sha256:abc"
    assert facts["settings"]["train"]["learning_rate"] == plan.recipe.train.learning_rate
    assert facts["evaluation"]["recovered"]["general"] == {"value": 0.61, "low": 0.55, "high": 0.70}
    assert facts["evaluation"]["decision"]["passed"] is True
    assert (facts["lineage"]["student"], facts["lineage"]["versions"]) == (str(DOMAIN), version)
    _, front, page = (folder / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(front)
    assert (head["base_model"], head["library_name"], head["pipeline_tag"]) == (str(DOMAIN), "transformers", "text-generation")
    assert f"The domain model `{DOMAIN}` (`models:/icd-coder/7`)" in page
    assert "| recovered share | 0.610 (0.550 to 0.700) |" in page
    assert (folder / "report.html").read_text() == "<html>report</html>"


def test_the_same_run_tells_the_same_twice(tmp_path: Path, store: Store) -> None:
    """Two attempts at once make one prefix, so nothing in it may be of the moment."""
    from camopd.export import export

    plan = make_run(str(tmp_path / "runs"), store)
    ids = {export(plan, str(tmp_path / name), store).content_id for name in ("a", "b")}
    assert len(ids) == 1


# --- Where people load it -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_in_an_object_store_loads_by_its_alias(
    s3_prefix: str, mlflow_server: str, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan, name = finish(f"{s3_prefix}/runs", store, mlflow_server, DOMAIN)
    made = client(mlflow_server).get_model_version_by_alias(name, "champion")
    assert made.source == export_uri(release_uri(plan, store))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)  # for MLflow's own functions, as in a notebook
    place = mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path / "loaded"))
    assert "optimizer" not in " ".join(path.name for path in Path(place).rglob("*"))
    mine, known = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (place, DOMAIN))
    assert mine.keys() == known.keys()
    assert all(torch.equal(mine[name], known[name]) for name in known)
    assert AutoTokenizer.from_pretrained(place)("A00")["input_ids"] == AutoTokenizer.from_pretrained(DOMAIN)("A00")["input_ids"]

    speaks = mlflow.transformers.load_model(f"models:/{name}@champion")
    assert speaks("A00", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("A00")

    command = [sys.executable, "-m", "mlflow", "artifacts", "download", "-u", f"models:/{name}@champion", "-d"]
    subprocess.run([*command, str(tmp_path / "by-command")], check=True, capture_output=True)
    files = {path.relative_to(tmp_path / "by-command").as_posix() for path in (tmp_path / "by-command").rglob("*.*")}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "report.html", "camopd.json"} <= files


@pytest.mark.slow
def test_an_adapter_loads_over_its_base(
    s3_prefix: str, mlflow_server: str, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = save_adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(DOMAIN), rank=2, alpha=1.0)
    settings = {"train": {"lora": {"rank": 2}}}
    plan, name = finish(f"{s3_prefix}/runs", store, mlflow_server, adapter, **settings)
    made = client(mlflow_server).get_model_version_by_alias(name, "champion")
    assert (made.tags["camopd.kind"], made.tags["camopd.base_uri"]) == ("lora-adapter", str(DOMAIN))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)  # for MLflow's own functions, as in a notebook
    place = mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path / "loaded"))
    loaded, known = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DOMAIN), folder).state_dict()
        for folder in (place, adapter)
    )
    assert any(".lora_" in name for name in known)
    assert all(torch.equal(loaded[name], known[name]) for name in known)
    _, front, page = Path(place, "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model_relation"] == "adapter"
    assert "PeftModel.from_pretrained" in page
    assert plan.content_ids["student"] in page
