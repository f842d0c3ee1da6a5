"""The micro example with vLLM for rollout and scoring, in its own environment, and the rest of the round in this one."""

import subprocess

import numpy as np
import pytest

from camopd import plan as layout
from camopd.engines import load_engine
from camopd.plan import Plan
from camopd.records import read_table
from camopd.score import score_rows
from camopd.store import Store, join
from tests.integration.runs import ROOT, SMALL, camopd, environment

INFERENCE = ROOT / ".venv-vllm" / "bin" / "camopd"
SHARDS = """
import sys
from camopd import workflow
for uri in workflow.spread(sys.argv[1]):
    workflow.rollout(uri)
for uri in workflow.gather(sys.argv[1]).score_uris:
    workflow.score(uri)
"""
VLLM = {
    "rollout.engine": "vllm",
    "vllm.dtype": "float32",
    "vllm.enforce_eager": "true",
    "vllm.gpu_memory_utilization": "0.5",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not (ROOT / ".venv-vllm" / ".ready").exists(), reason="`make test-vllm` sets up the environment"),
]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_round_sampled_and_scored_by_vllm_is_the_trainers_own(shards, tmp_path) -> None:
    settings = SMALL | VLLM | {"output": str(tmp_path), "shards": str(shards)}
    run_uri = camopd("prepare", "micro", settings=settings).splitlines()[-1]
    round_uri = layout.round_uri(run_uri, 1)
    if shards > 1:
        command, around = [INFERENCE.with_name("python"), "-c", SHARDS, round_uri], environment(VLLM_CPU_KVCACHE_SPACE="1")
        subprocess.run(command, cwd=ROOT, env=around, check=True)
    else:
        for verb in ("rollout", "score"):
            camopd(verb, round_uri, program=INFERENCE, VLLM_CPU_KVCACHE_SPACE="1")
    for verb in ("select", "train"):
        camopd(verb, round_uri)

    store = Store()
    plan = Plan.load(store, run_uri)
    rollouts = read_table(store.fetch(join(layout.rollout_uri(round_uri), "rollouts.parquet")), "rollouts")
    limits = {"vocab_size": plan.vocab_size, "batch_size": 64, "batch_tokens": 4096, "max_length": 128}
    student = load_engine("transformers", store.fetch(plan.student_uri(1)), **limits)
    own = dict(student.score([row["prompt_ids"] for row in rollouts], [row["response_ids"] for row in rollouts]))
    assert len(rollouts) == 4 * 12
    for index, row in enumerate(rollouts):
        assert own[index].logprobs == pytest.approx(row["logprobs"], abs=1e-4)

    for branch in plan.active_branches(1):
        teacher = load_engine("transformers", store.fetch(plan.teacher_uri(branch)), **limits)
        expected = score_rows(teacher, [row for row in rollouts if row["branch"] == branch.name], plan)
        found = read_table(store.fetch(join(layout.score_uri(round_uri, branch.name), "scored.parquet")), "scored")
        assert [row["prompt_id"] for row in found] == [row["prompt_id"] for row in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["teacher_logprobs"] == pytest.approx(theirs["teacher_logprobs"], abs=1e-3)
            np.testing.assert_allclose(np.exp(ours["topk_logprobs"]), np.exp(theirs["topk_logprobs"]), atol=1e-4)

    assert store.require(layout.checkpoint_uri(round_uri)).metrics["engine_gap"] < 1e-4
