"""The compiled pipeline, run by KFP's local runner with the real stages on the example's models.

A few prompts and tokens: what is looked at is the graph, also when a round fails in the middle.
"""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kfp import dsl
from mlflow import MlflowClient

from camopd import plan as layout
from camopd import workflow
from camopd.rounds import record_stop
from camopd.store import Store
from components.report_outcome import report_outcome
from pipelines.runner import run_compiled
from pipelines.warm import run_component
from tests.integration.runs import weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Task .* have no effect", "ignore:You may be attemping to run"),  # by KFP
]

NOTES = 'it\'s "fine"\nline 2 {a} {{workflow.name}} $(date) `id` \\n'
Run = Callable[..., tuple[Path, str]]


@pytest.fixture
def run(small_recipe: Path, tmp_path: Path, mlflow_sqlite: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the compiled pipeline; returns the run's folder and what the exit handler said. Fails when the pipeline does."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_sqlite)

    def start(*, fails: str = "", **form: str | bool) -> tuple[Path, str]:
        parameters = {"input_recipe": str(small_recipe), "output_uri": str(tmp_path / "runs"), **form}
        root = tmp_path / f"kfp-{len(list(tmp_path.glob('kfp-*')))}"
        if fails:
            with pytest.raises(RuntimeError, match=f"Inner task failed: .*{fails}"):
                run_compiled(parameters, root=root)
        else:
            run_compiled(parameters, root=root)
        (outcome,) = root.glob("*/report-outcome/outcome")
        (folder,) = (*(tmp_path / "runs").glob("graph-*"), tmp_path)[:1]
        return folder, outcome.read_text(encoding="utf-8")

    return start


def manifests(folder: Path) -> set[str]:
    """Finished prefixes below a run's folder."""
    return {path.parent.relative_to(folder).as_posix() for path in folder.rglob("manifest.json")}


def release(folder: Path) -> dict[str, Any]:
    """What promotion did, the last time."""
    path = max(folder.glob("release/*/release.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(path.read_text(encoding="utf-8"))


def rounds(*numbers: int) -> set[str]:
    stages = ("rollout", "score-general", "score-domain", "select", "train")
    return {f"rounds/{number:04d}/{stage}" for number in numbers for stage in stages}


def test_a_round_that_fails_in_the_middle_stops_the_run_and_is_taken_up_again(run):
    folder, outcome = run(method_num_rounds="1", output_notes=NOTES)
    assert "finished" in outcome
    assert rounds(1) <= manifests(folder)
    assert json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["notes"] == NOTES

    weights = folder / "rounds/0001/train/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    folder, outcome = run(method_num_rounds="3", fails="rollout")
    assert "failed in rollout" in outcome
    assert "rounds/0002/rollout" in outcome
    assert not manifests(folder) & rounds(2, 3), "nothing dear was started after the failure"

    weights.write_bytes(whole)
    first = weights.stat().st_mtime_ns
    folder, outcome = run(method_num_rounds="3")
    assert "finished" in outcome
    assert rounds(1, 2, 3) <= manifests(folder)
    assert weights.stat().st_mtime_ns == first, "a finished round is not done again"
    assert (release(folder)["status"], release(folder)["version"]) == ("promoted", 2), (
        "one version for one and for three rounds"
    )


def test_a_round_without_a_domain_step_asks_no_domain_teacher(run, small_recipe, tmp_path):
    """The cycle is G, G, G, D: of rounds of two steps the first has general prompts alone. `camopd run` makes the same."""
    small_recipe.write_text("steps_per_round = 2\n" + small_recipe.read_text())
    folder, outcome = run(method_num_rounds="2")
    assert "finished" in outcome
    assert rounds(1, 2) - manifests(folder) == {"rounds/0001/score-domain"}
    here = workflow.run(str(small_recipe), {"output": str(tmp_path / "here"), "num_rounds": 2}).uri
    assert weights(here) == weights(str(folder))
    assert manifests(Path(here)) >= rounds(2)


def test_a_shard_that_fails_is_done_again_alone_and_the_weights_are_those_of_one_pod(run, small_recipe, tmp_path):
    small = small_recipe.read_text().replace("[rollout]", "[score]\nbatch_tokens = 64\n[rollout]\nbatch_size = 4")
    small_recipe.write_text(small)
    here = workflow.run(str(small_recipe), {"output": str(tmp_path / "here"), "num_rounds": 2}).uri
    small_recipe.write_text("shards = 2\n" + small)
    folder, outcome = run(method_num_rounds="1")
    assert "finished" in outcome
    shards = {f"{stage}-{number}-of-2" for stage in ("rollout", "score-general", "score-domain") for number in (1, 2)}
    assert manifests(folder / "rounds/0001/shards") == shards
    assert rounds(1) <= manifests(folder)

    lost = folder / "rounds/0002/shards/rollout-2-of-2"
    lost.parent.mkdir(parents=True)
    lost.write_text("a file where the shard's folder would be")
    folder, outcome = run(method_num_rounds="2", fails="rollout-2")
    assert "failed in rollout" in outcome
    assert "rollout-2-of-2" in outcome
    assert not manifests(folder) & rounds(2)
    kept = folder / "rounds/0002/shards/rollout-1-of-2/manifest.json"
    made = kept.stat().st_mtime_ns

    lost.unlink()
    folder, outcome = run(method_num_rounds="2")
    assert "finished" in outcome
    assert kept.stat().st_mtime_ns == made, "a finished shard is not done again"
    assert weights(str(folder)) == weights(here)


def test_the_exit_handler_takes_both_words_for_success(run, small_recipe, tmp_path):
    """SUCCEEDED comes from the local runner, COMPLETE from a cluster, whose message is empty."""
    run(method_num_rounds="1")
    (job,) = (tmp_path / "runs/jobs").iterdir()
    page = tmp_path / "outcome.md"
    for state, title in {"SUCCEEDED": "finished", "COMPLETE": "finished", "FAILED": "was cut off"}.items():
        report_outcome.python_func(
            job=job.stem,
            output_uri=str(tmp_path / "runs"),
            recipe=str(small_recipe),
            status=dsl.PipelineTaskFinalStatus(state, "projects/x", "recover", None, None),
            outcome=SimpleNamespace(path=page),
        )
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"## The recovery {title}\n")
        assert ("**Registry:** camopd-recovered version 1" in text) == (title == "finished")


def test_a_run_that_stopped_itself_starts_nothing_dear(run):
    folder, _ = run(method_num_rounds="1", output_promote=False)
    assert (release(folder)["status"], release(folder)["version"]) == ("refused", None)
    record_stop(str(folder), stage="train", round_number=2, reason="the loss is not finite", store=Store())
    folder, outcome = run(method_num_rounds="3", fails="evaluate")
    assert not manifests(folder) & rounds(2, 3)
    assert "stopped itself" in outcome
    assert "the loss is not finite" in outcome
    assert layout.stop_uri(str(folder)) in outcome


def test_bad_input_is_told_by_the_exit_handler_too(run, tmp_path):
    _, outcome = run(input_general_model_uri=str(tmp_path / "nowhere"), method_seed="-1", fails="prepare")
    assert "method_seed" in outcome
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("graph-*"))


def test_components_of_several_threads_keep_their_exit_codes(monkeypatch):
    """A code that another thread has read is 255 to the one that waits for it; here each takes its time to read."""

    def slowly(sentinel, read=forkserver.read_signed):
        time.sleep(random.uniform(0, 0.1))
        return read(sentinel)

    monkeypatch.setattr(forkserver, "read_signed", slowly)
    source = "import sys; sys.exit(7)"
    command = ["sh", "-ec", "kfp.dsl.executor_main", source, "--executor_input", "{}", "--function_to_execute", "f"]
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: run_component(command), range(24))) == {7}


def test_a_schedule_recovers_a_model_once_and_then_ends_at_its_first_task(run: Run, mlflow_sqlite: str, tmp_path: Path):
    folder, said = run(schedule_name="nightly", method_num_rounds="1")
    assert "## The recovery finished" in said
    done = manifests(folder)
    _, said = run(schedule_name="nightly", method_num_rounds="1")
    assert said.startswith("## The recovery was not started")
    assert f"skipped: nothing new since {Path('examples/micro/domain').absolute()} (content id sha256:" in said
    assert f"in {folder}, registered as camopd-recovered version 1, alias champion (promoted))" in said
    assert {path.parent.name for path in (tmp_path / "kfp-1").glob("*/*/*")} == {"report-outcome", "resolve"}
    assert manifests(folder) == done
    client = MlflowClient(mlflow_sqlite)
    (experiment,) = (each.experiment_id for each in client.search_experiments() if each.name == "camopd")
    runs = {each.info.run_name: each for each in client.search_runs([experiment], "tags.`camopd.schedule` = 'nightly'")}
    assert set(runs) == {"schedule nightly", folder.name}
    assert runs["schedule nightly"].data.metrics == {"ticks/new": 1, "ticks/skipped": 1}
    assert runs["schedule nightly"].data.tags["camopd.status"].startswith("skipped: nothing new since")
