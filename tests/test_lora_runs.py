"""Whole recoveries of the micro example with adapters: as domain model, as teacher, as what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from camopd import plan as layout
from camopd import workflow
from camopd.adapters import Weights
from camopd.plan import Plan
from camopd.recover import Session, recover
from camopd.store import Store
from tests.integration.runs import ROOT
from tests.test_recover import SMALL, content, in_one_process, prepared
from tests.tiny import save_adapter

pytestmark = pytest.mark.slow
GENERAL = ROOT / "examples/micro/general"
RATE = {"train.learning_rate": 1e-2, "train.diagnose_every": 3}
QUICK = {**SMALL, **RATE, "num_rounds": 2, "steps_per_round": 2}


@pytest.fixture(autouse=True)
def _no_tracking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """A domain model that is the general one with an adapter; its B is small, so it still speaks."""
    model = AutoModelForCausalLM.from_pretrained(GENERAL)
    return str(save_adapter(tmp_path / "domain-adapter", model, rank=2, alpha=1.0))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_adapter_comes_out_is_evaluated_and_promoted(tmp_path, mlflow_sqlite) -> None:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    wish = {**QUICK, "output": str(tmp_path / "runs"), "train.lora.rank": 4, "tracking.uri": mlflow_sqlite}
    recovered = recover("micro", wish)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names(recovered.checkpoint)
    assert not {"model.safetensors", "config.json"} & names(recovered.checkpoint)
    assert set(recovered.evaluation["models"]) == {"before", "after", "teacher-general"}

    version = MlflowClient(mlflow_sqlite).get_model_version_by_alias("micro-recovered", "champion")
    plan = Plan.load(Store(), recovered.run_uri)
    domain = str(ROOT / "examples/micro/domain")
    assert version.tags["camopd.kind"] == "lora-adapter"
    assert version.tags["camopd.base_uri"] == domain
    assert version.tags["camopd.base_content_id"] == plan.content_ids["student"] == Store().content_id(domain)
    model = AutoModelForCausalLM.from_pretrained(download_artifacts(version.source))
    assert model.config.model_type == "qwen3"
    for uri in plan.rounds:
        assert Store().require(layout.checkpoint_uri(uri)).inputs["base"] == plan.content_ids["student"]


@pytest.mark.parametrize("kind", ["whole", "merged", "adapter"])
def test_a_domain_model_that_is_an_adapter(kind, adapter, tmp_path) -> None:
    """The general teacher is its base, the domain's teacher is itself, frozen."""
    lora = {} if kind == "whole" else {"train.lora.output": kind}
    settings = {**QUICK, **lora, "output": str(tmp_path / "runs"), "student": adapter, "base": str(GENERAL)}
    rate = {"train.learning_rate": 1e-4} if kind == "whole" else {}
    recovered = recover("micro", settings | rate)
    files = names(recovered.checkpoint)
    assert ("model.safetensors" in files) == (kind != "adapter")
    assert ("adapter_model.safetensors" in files) == (kind == "adapter")
    assert ("trainer/adapter/adapter_model.safetensors" in files) == (kind == "merged")
    assert {"tokenizer.json", "tokenizer_config.json"} <= files
    plan = Plan.load(Store(), recovered.run_uri)
    assert plan.content_ids["teacher/general"] == plan.content_ids["student/base"]
    assert set(recovered.evaluation["models"]) == {"before", "after", "teacher-general"}

    steps = json.loads((recovered.checkpoint / "steps.json").read_text())
    assert steps[0]["engine_gap"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(recovered.checkpoint)
    assert model.config.model_type == "qwen3"


def test_one_set_of_weights_in_memory(adapter, tmp_path, monkeypatch) -> None:
    from camopd.engines.transformers import load_model

    loaded: list[Path] = []

    def counted(path: Path, *arguments: Any) -> Any:
        loaded.append(path)
        return load_model(path, *arguments)

    monkeypatch.setattr("camopd.lora.load_model", counted)
    monkeypatch.setattr("camopd.recover.load_model", counted)
    plan = prepared(
        tmp_path, {**QUICK, "execution": "colocated", "student": adapter, "base": str(GENERAL), "train.lora.output": "adapter"}
    )
    session = Session(plan, 1, Store())
    assert loaded == [GENERAL]
    gaps = [session.step()[1]["branches"] for _ in range(4)]
    assert max(own["general"]["gap"] for own in gaps if "general" in own) > 1e-2
    assert plan.weights(plan.recipe.student, Store()) == Weights(str(GENERAL), adapter)


@pytest.mark.parametrize("output", ["adapter", "merged"])
def test_stopped_after_any_round_it_ends_with_the_same_bytes(output, tmp_path) -> None:
    settings = {**QUICK, "num_rounds": 3, "train.lora.output": output, "train.lora.rank": 4}
    once = content(in_one_process(tmp_path / "once", **settings))
    plan = prepared(tmp_path / "again", {**settings, "execution": "colocated"})
    for number in (1, 2, 3):
        Session(plan, number, Store()).round(number)
    assert content(plan.run_uri) == once


def test_the_stages_do_it_too(adapter, tmp_path) -> None:
    """Sampled, scored, trained by two processes and evaluated stage by stage; teachers answer: two models over one base."""
    settings = {
        **QUICK,
        "output": str(tmp_path / "runs"),
        "method": "off-policy-kd",
        "score.signal": "sampled",
        "student": adapter,
        "base": str(GENERAL),
        "train.lora.output": "adapter",
        "train.num_processes": 2,
    }
    done = workflow.run("micro", settings)
    plan = Plan.load(Store(), done.uri)
    first, last = (Path(layout.checkpoint_uri(plan.rounds[number])) for number in (0, -1))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, last))
    assert any(not before[name].equal(after[name]) for name in before)
