"""A recovery of the micro example after `camopd gc`: done is done, more rounds go on, another gate is another evaluation."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from camopd import plan as layout
from camopd import workflow
from camopd.evaluate import evaluation_uri
from camopd.plan import Plan
from camopd.store import Store, join
from camopd.tracking.references import normalised
from tests.integration.runs import ROOT, SMALL, camopd

pytestmark = pytest.mark.slow

RECIPE = str(ROOT / "recipes" / "micro.toml")
SETTINGS = SMALL | {"num_rounds": "3", "evaluate.curve_points": "1"}


def files(run_uri: str) -> dict[str, int]:
    """When each file below a run was written."""
    root = Path(run_uri)
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_after_a_removal(tmp_path, monkeypatch, webhook) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW")]:
        monkeypatch.delenv(name)
    store, asked = Store(), SETTINGS | {"output": str(tmp_path)}
    first = workflow.run(RECIPE, asked)
    plan = Plan.load(store, first.uri)
    evaluated = evaluation_uri(plan, store)
    then = time.time() - 40 * 86400
    for path in tmp_path.rglob("*"):
        os.utime(path, (then, then))
    said = json.loads(camopd("gc", str(tmp_path), "--delete", "--no-registry", "--json"))
    assert len([one for one in said["removed"] if one["what"].endswith("/train")]) == 2
    before = files(first.uri)
    assert [(sent["status"], sent["run_uri"]) for sent in webhook.sent] == [("refused", first.uri)]

    assert workflow.run(RECIPE, asked).release == first.release
    assert len(webhook.sent) == 1  # it was told
    took = [line for line in camopd("run", RECIPE, settings=asked).splitlines() if line.startswith("Took:")]
    assert len(took) == 1
    assert took[0].endswith(" MB written")
    after = files(first.uri)
    assert {name for name in after if name not in before} == set()
    assert {name.partition("/")[0] for name in after if after[name] != before[name]} <= {
        "recipe.json",
        "settings.md",
        "release",
    }
    assert evaluation_uri(Plan.load(store, first.uri), store) == evaluated

    stricter = workflow.run(RECIPE, asked | {"gate.min_retained": "0.5"})  # another evaluation, without the round that is gone
    other = evaluation_uri(Plan.load(store, stricter.uri), store)
    assert other != evaluated
    assert [at["round"] for at in json.loads(store.read(join(other, "evaluation.json")))["curve"]] == [0, 3]
    assert [at["round"] for at in json.loads(store.read(join(evaluated, "evaluation.json")))["curve"]] == [0, 2, 3]

    longer = workflow.run(RECIPE, asked | {"num_rounds": "4"})
    assert longer.uri == first.uri
    assert store.manifest(layout.checkpoint_uri(layout.round_uri(first.uri, 4))) is not None
    assert store.manifest(layout.checkpoint_uri(layout.round_uri(first.uri, 1))) is None
    whole = workflow.run(RECIPE, asked | {"num_rounds": "4", "output": str(tmp_path / "never-collected")})
    ends = [store.require(layout.checkpoint_uri(layout.round_uri(uri, 4))).content_id for uri in (longer.uri, whole.uri)]
    assert ends[0] == ends[1]


def test_a_promoted_model_is_whole_afterwards(tmp_path, monkeypatch, mlflow_sqlite, webhook) -> None:
    """Even where no checkpoint is to stay: what the version points to does, and the run is a promoted one as before."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_sqlite)
    store, output = Store(), tmp_path / "runs"
    asked = {"num_rounds": "2", "output": str(output), "gate.min_retained": "0.5"}
    first = workflow.run(RECIPE, asked)
    assert first.release["status"] == "promoted"
    then = time.time() - 40 * 86400
    for path in output.rglob("*"):
        os.utime(path, (then, then))
    camopd("gc", str(output), "--delete", "--checkpoints", "none", "--whole-runs", MLFLOW_TRACKING_URI=mlflow_sqlite)
    plan = Plan.load(store, first.uri)
    assert store.manifest(layout.checkpoint_uri(plan.rounds[0])) is None
    version = MlflowClient(mlflow_sqlite).get_model_version_by_alias("micro-recovered", "champion")
    assert store.verify(normalised(version.source), deep=True) == []
    assert workflow.run(RECIPE, asked).release["status"] == "already-promoted"
    assert [sent["status"] for sent in webhook.sent] == ["success"]
