"""Several shards make what one pod makes, to the byte, also when their number changes on the way."""

import json
from pathlib import Path

import pytest

from camopd import plan as layout
from camopd import workflow
from camopd.errors import InputError, StoreError
from camopd.plan import Plan
from camopd.shards import Shard, shard_uri
from camopd.store import Store
from tests.integration.runs import ROOT, weights

pytestmark = pytest.mark.slow
SMALL = {
    "num_rounds": 2,
    "steps_per_round": 4,
    "rollout.prompts_per_step": 12,
    "rollout.batch_size": 8,
    "score.batch_tokens": 256,
    "evaluate.limit": 12,
    "evaluate.curve_points": 0,
    "evaluate.bootstrap": 100,
}
RECIPE = str(ROOT / "recipes" / "micro.toml")
Files = dict[str, bytes]


def rounds_of(run_uri: str) -> list[str]:
    return Plan.load(Store(), run_uri).rounds


def files(run_uri: str) -> Files:
    """Everything that the stages of the rounds have made, without the shards and the manifests, which hold times."""
    root = Path(run_uri, "rounds")
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if "/shards/" not in name and not name.endswith("manifest.json")}


@pytest.fixture(scope="module")
def one_pod(tmp_path_factory) -> str:
    """The rounds of a run by one pod."""
    run_uri = workflow.prepare(RECIPE, SMALL | {"output": str(tmp_path_factory.mktemp("one"))}).uri
    for uri in rounds_of(run_uri):
        workflow.one_round(uri)
    return run_uri


def test_tables_and_weights_are_those_of_one_pod(one_pod, tmp_path) -> None:
    run_uri = workflow.prepare(RECIPE, SMALL | {"output": str(tmp_path), "shards": 3}).uri
    assert run_uri.rpartition("/")[2] == one_pod.rpartition("/")[2], "it is the same run"
    for uri in rounds_of(run_uri):
        workflow.one_round(uri)
    assert files(run_uri) == files(one_pod)
    assert weights(run_uri) == weights(one_pod)
    metrics = Store().require(layout.rollout_uri(rounds_of(run_uri)[0])).metrics
    alone = Store().require(layout.rollout_uri(rounds_of(one_pod)[0])).metrics
    assert metrics["num_shards"] == 3
    measured = {"num_shards", "waiting_share", "engine_seconds", "tokens_per_second"}
    measured |= {"shard_seconds", "shard_seconds_waited", "shard_gpu_seconds", "shard_bytes"}
    assert {k: v for k, v in metrics.items() if k not in measured} == {k: v for k, v in alone.items() if k not in measured}
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["engine_seconds"], rel=0.01)


def test_another_number_of_shards_starts_the_unfinished_part_anew(one_pod, tmp_path) -> None:
    """A shard of two and three shards of three: nothing of the first is taken, and the rest is kept."""
    store, asked = Store(), SMALL | {"output": str(tmp_path), "num_rounds": 1}
    run_uri = workflow.prepare(RECIPE, asked | {"shards": 2}).uri
    (round_uri,) = rounds_of(run_uri)
    half = workflow.spread(round_uri)[0]
    workflow.rollout(half)
    with pytest.raises(StoreError, match="rollout-2-of-2 is not finished"):
        workflow.gather(round_uri)
    workflow.prepare(RECIPE, asked | {"shards": 3})
    for uri in workflow.spread(round_uri):
        workflow.rollout(uri)
    scores = workflow.gather(round_uri).score_uris
    assert len(scores) == 2 * 3
    workflow.score(scores[0])
    kept = Path(shard_uri(layout.score_uri(round_uri, "general"), Shard(1, 3)), "manifest.json")
    made = kept.stat().st_mtime_ns
    workflow.prepare(RECIPE, asked | {"shards": 1})
    assert workflow.spread(round_uri) == [round_uri], "the rollout is finished, whoever made it"
    workflow.one_round(round_uri)
    assert kept.stat().st_mtime_ns == made
    assert json.loads(Path(half, "manifest.json").read_text())["config"]["shard"] == "1 of 2"
    assert weights(run_uri) == weights(one_pod)[:1]
    assert store.require(layout.score_uri(round_uri, "general")).metrics.get("num_shards") is None


def test_prompts_that_a_teacher_makes_up_are_made_by_one_pod(tmp_path) -> None:
    """Several would make the same ones at the same time. Later rounds are spread."""
    asked = SMALL | {"output": str(tmp_path), "shards": 2, "branches.general.teacher_prompts": 0.5}
    asked |= {"branches.general.num_teacher_prompts": 40}
    run_uri = workflow.prepare(RECIPE, asked).uri
    first, second = rounds_of(run_uri)
    assert workflow.spread(first) == [first]
    workflow.rollout(first)
    assert len(workflow.spread(second)) == 2


def test_shards_of_one_process_are_refused() -> None:
    with pytest.raises(InputError, match="shards: 2 pods need the stages"):
        workflow.prepare(RECIPE, {"shards": 2, "execution": "colocated"})
