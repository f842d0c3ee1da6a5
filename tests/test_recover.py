"""The recovery in one process: the same weights as the stages, and everything else that a run has."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from camopd import plan as layout
from camopd import rounds, workflow
from camopd.errors import InputError, UnhealthyRunError
from camopd.outcome import describe
from camopd.plan import Plan
from camopd.recover import Session, recover
from camopd.store import Store, join
from tests.integration.runs import checkpoints, the_run, weights

pytestmark = pytest.mark.slow
SMALL = {
    "num_rounds": 4,
    "steps_per_round": 1,
    "rollout.prompts_per_step": 8,
    "rollout.max_empty_fraction": 1,
    "evaluate.limit": 4,
    "evaluate.curve_points": 0,
    "evaluate.bootstrap": 100,
    "gate.min_recovered": -9,
    "gate.min_retained": 0,
}


@pytest.fixture(autouse=True)
def _no_tracking_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def prepared(output: Path, settings: Mapping[str, Any]) -> Plan:
    store = Store()
    return Plan.load(store, workflow.prepare("micro", {**SMALL, "output": str(output), **settings}, store=store).uri)


def by_stages(output: Path, **settings: Any) -> str:
    """The prefix of a run whose rounds the pipeline's stages made."""
    plan = prepared(output, settings)
    for uri in plan.rounds:
        workflow.one_round(uri)
    return plan.run_uri


def in_one_process(output: Path, **settings: Any) -> str:
    """The prefix of a run whose rounds one session made."""
    plan = prepared(output, {**settings, "execution": "colocated"})
    session = Session(plan, 1, Store())
    for number in range(1, plan.recipe.num_rounds + 1):
        session.round(number)
    return plan.run_uri


def content(run_uri: str) -> list[str]:
    """Content id of each round's checkpoint: weights, optimiser and steps.json."""
    return [manifest.content_id for manifest in checkpoints(run_uri)]


# --- The same weights as the stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"score.signal": "topk"},
        {"score.signal": "topk", "score.top_k_of": "student"},
        {"score.signal": "sampled", "score.empty_answers": "score"},
        {"method": "mopd", "num_rounds": 2},
        {"train.precision": "bfloat16", "train.activation_checkpointing": True, "num_rounds": 2},
        {"method": "off-policy-kd", "score.signal": "sampled", "num_rounds": 2},
        {"train.lora.rank": 4, "train.learning_rate": 1e-2, "num_rounds": 2},
    ],
    ids=lambda settings: " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()),
)
def test_with_one_update_a_round_the_bytes_are_those_of_the_stages(settings, tmp_path) -> None:
    together = weights(in_one_process(tmp_path, **settings))
    assert together == weights(by_stages(tmp_path, **settings))
    assert len(set(together)) == len(together) >= 2


def test_a_round_of_several_updates_has_a_fresh_batch_for_each(tmp_path) -> None:
    """Four rounds of one update and one round of four make the same model: nothing is sampled from older weights."""
    by_one, by_four = (in_one_process(tmp_path, num_rounds=4 // steps, steps_per_round=steps) for steps in (1, 4))
    assert weights(by_one)[-1:] == weights(by_four)


# --- Signals --------------------------------------------------------------------------------------------------------------


def losses(output: Path, **settings: Any) -> list[float]:
    plan = prepared(output, {**settings, "execution": "colocated", "num_rounds": 1, "steps_per_round": 2, "method": "mopd"})
    Session(plan, 1, Store()).round(1)
    steps = json.loads(Store().read(join(layout.checkpoint_uri(plan.rounds[0]), "steps.json")))
    return [step["loss"] for step in steps]


def test_the_whole_vocabulary_is_the_limit_of_its_most_likely_tokens(tmp_path) -> None:
    whole = losses(tmp_path, **{"score.signal": "full"})
    every_token = losses(tmp_path, **{"score.signal": "topk", "score.top_k": 10_000})
    few = losses(tmp_path, **{"score.signal": "topk", "score.top_k": 1})
    assert every_token == pytest.approx(whole, rel=1e-3)
    assert few != pytest.approx(whole, rel=1e-2)


def test_the_stages_refuse_the_whole_vocabulary(tmp_path) -> None:
    with pytest.raises(InputError, match="camopd recover") as caught:
        workflow.run("micro", {**SMALL, "output": str(tmp_path), "score.signal": "full"})
    assert len(caught.value.problems) == 1
    assert not list(tmp_path.iterdir())


# --- The whole run --------------------------------------------------------------------------------------------------------


def everything(run_uri: str) -> dict[str, int]:
    """Time of the last change of every file of a run, the records of the last call aside."""
    rewritten = ("recipe.json", "settings.md", "release/", "attempts/release", "tracking")
    files = (path for path in Path(run_uri).rglob("*") if path.is_file())
    times = {path.relative_to(run_uri).as_posix(): path.stat().st_mtime_ns for path in files}
    return {name: time for name, time in times.items() if not name.startswith(rewritten)}


def test_a_notebook_gets_all_that_a_pipeline_leaves(tmp_path, mlflow_sqlite) -> None:
    from mlflow import MlflowClient
    from transformers import AutoModelForCausalLM

    wish = {**SMALL, "output": str(tmp_path / "runs"), "num_rounds": 2, "tracking.uri": mlflow_sqlite}
    recovered = recover("micro", wish)
    model = AutoModelForCausalLM.from_pretrained(recovered.checkpoint)
    assert model.config.model_type == "qwen3"
    assert 0 <= recovered.scores["retained_domain"] <= 2
    assert "<html" in recovered.report.read_text(encoding="utf-8")

    client = MlflowClient(mlflow_sqlite)
    version = client.get_model_version_by_alias("micro-recovered", "champion")
    assert (recovered.release["version"], recovered.release["status"]) == (int(version.version), "promoted")
    assert version.source == Path(recovered.release["checkpoint_uri"]).as_uri()
    exported, trained = (
        Path(place) / "model.safetensors" for place in (recovered.release["checkpoint_uri"], recovered.checkpoint)
    )
    assert exported.read_bytes() == trained.read_bytes()
    (experiment,) = client.search_experiments(filter_string="name = 'camopd'")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`camopd.run_id` != '' AND tags.`camopd.decision` = 'pass'")
    assert run.info.status == "FINISHED"
    nested = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    assert sorted(each.data.tags["camopd.round"] for each in nested) == ["1", "2"]
    assert "The recovery finished" in describe(recovered.run_uri, succeeded=True, store=Store())

    before = everything(recovered.run_uri)
    again = recover("micro", wish)
    assert (again.run_uri, again.scores, again.release["version"]) == (recovered.run_uri, recovered.scores, 1)
    assert everything(recovered.run_uri) == before, "a finished run does nothing again"


def test_a_run_that_stops_itself_says_why_now_and_later(tmp_path) -> None:
    wish = {**SMALL, "output": str(tmp_path), "rollout.max_empty_fraction": 0, "train.max_engine_gap": 1e-12}
    with pytest.raises(UnhealthyRunError, match=r"train\.max_engine_gap"):
        recover("micro", wish)
    with pytest.raises(UnhealthyRunError, match=r"stopped itself[\s\S]*round 1, train: .*train\.max_engine_gap"):
        recover("micro", wish)


# --- Stopped and continued ------------------------------------------------------------------------------------------------

LONGER = {**SMALL, "num_rounds": 5, "steps_per_round": 2, "train.diagnose_every": 3}


def start(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A call in a process of its own, forked from one that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["camopd.train"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path) -> None:
    def wish(output: str) -> dict[str, Any]:
        return {**LONGER, "output": str(tmp_path / output)}

    moments = random.Random(5)
    for place in ("plan", "rounds/0001/train", "rounds/0002/train", "rounds/0003/train"):
        process, begun = start(recover, "micro", wish("killed")), time.monotonic()
        while not list(tmp_path.glob(f"killed/*/{place}/manifest.json")):
            process.join(0.01)
            assert process.exitcode is None
        process.join(moments.uniform(0, 0.3) * (time.monotonic() - begun))
        assert process.is_alive(), "it ended before its moment"
        process.kill()
        process.join()
    start(recover, "micro", wish("unbroken")).join()
    process = start(recover, "micro", wish("killed"))
    process.join()
    assert process.exitcode == 0
    runs = [the_run(str(tmp_path / name)) for name in ("killed", "unbroken")]
    assert weights(runs[0]) == weights(runs[1])
    assert content(runs[0]) == content(runs[1])


def test_more_rounds_go_on_where_fewer_ended(tmp_path) -> None:
    fewer = recover("micro", {**LONGER, "output": str(tmp_path / "a"), "num_rounds": 2})
    more = recover("micro", {**LONGER, "output": str(tmp_path / "a"), "num_rounds": 3})
    assert fewer.run_uri == more.run_uri
    assert content(more.run_uri) == content(in_one_process(tmp_path / "b", **{**LONGER, "num_rounds": 3}))


def test_a_round_that_another_process_finished_is_gone_on_from(tmp_path, monkeypatch) -> None:
    """Both run the same recovery; this one finds round 2 done when it comes to it, and its own model is a round behind."""
    begin = rounds.begin

    def begin_after_the_other(round_uri: str, *, store: Store) -> str:
        run_uri, number = layout.run_and_round(round_uri)
        if number == 2:
            Session(Plan.load(store, run_uri), 2, store).round(2)
        return begin(round_uri, store=store)

    monkeypatch.setattr(rounds, "begin", begin_after_the_other)
    done = recover("micro", {**SMALL, "output": str(tmp_path / "a"), "num_rounds": 3})
    assert weights(done.run_uri) == weights(in_one_process(tmp_path / "b", num_rounds=3))
