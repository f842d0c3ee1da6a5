"""vLLM beside a trainer, for real on a CPU: whatever it samples comes from the weights that the trainer has at that moment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from camopd import plan as layout
from camopd import workflow
from camopd.config import VLLM
from camopd.engines.handover import check_taken, weights_file
from camopd.errors import EngineError, UnhealthyRunError
from camopd.plan import Plan
from camopd.store import Store
from tests.integration.runs import ROOT
from tests.test_vllm_engine import MAX_LENGTH, PROMPTS, SEEDS, SHARED, VOCAB, exact_logprobs, of_tokens, pytestmark, sample_all
from tests.tiny import save_adapter, tiny_model

__all__ = ["pytestmark"]
SETTINGS = VLLM(dtype="float32", gpu_memory_utilization=0.5, enforce_eager=True)


def model_of(**settings: Any):
    model = tiny_model(vocab_size=VOCAB, head_dim=32, max_length=MAX_LENGTH, **settings)
    with torch.no_grad():
        model.model.embed_tokens.weight[SHARED:] *= 6  # likely ids that must never be sampled
    return model


@torch.no_grad()
def move(model, seed: int) -> None:
    """Change every tensor so much that any one left behind would show."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight += 0.3 * weight.std().clamp(min=0.3) * torch.randn(weight.shape, generator=generator)


def gap(model, samples) -> float:
    """Largest |log p_engine - log p| of what was sampled, by a forward pass in float64 with the model's present weights."""
    model = model_copy(model)
    exact = {i: of_tokens(exact_logprobs(PROMPTS[i], s.token_ids, SHARED, model), s.token_ids) for i, s in samples.items()}
    return max(float(np.abs(sample.logprobs - exact[i]).max()) for i, sample in samples.items())


def model_copy(model):
    made = type(model)(model.config).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request, tmp_path_factory) -> Iterator[tuple[Any, Any]]:
    """A model that trains, and the engine that was started from its first weights."""
    from camopd.engines.colocated import ColocatedVllm

    model, folder = model_of(tied=request.param), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    limits = {"vocab_size": SHARED, "batch_size": 8, "batch_tokens": 24, "max_length": MAX_LENGTH}
    with closing(ColocatedVllm(folder, **limits, settings=SETTINGS)) as engine:
        yield model, engine


def test_every_sample_comes_from_the_weights_of_its_moment(pair) -> None:
    """Three times, with the head's padding masked each time: a hook that a reload drops would let it through."""
    model, engine = pair
    drawn = []
    for seed in range(3):
        with engine.awake(model):
            samples = sample_all(engine)
        assert gap(model, samples) < 1e-4
        assert max(sample.token_ids.max() for sample in samples.values()) < SHARED
        drawn.append([samples[i].token_ids.tolist() for i in range(len(SEEDS))])
        move(model, seed)
        assert gap(model, samples) > 0.1, "it would have shown"
    assert drawn[0] != drawn[1] != drawn[2]
    with engine.awake(model):
        responses = [[4, 5, 2], [6, 7, 8, 9, 2], [3], [2], [15, 14, 13, 12]]
        for index, scores in engine.score(PROMPTS, responses):
            exact = of_tokens(exact_logprobs(PROMPTS[index], responses[index], SHARED, model_copy(model)), responses[index])
            assert scores.logprobs == pytest.approx(exact, abs=1e-4)


def test_it_sleeps_between_and_answers_nothing_then(pair) -> None:
    model, engine = pair
    assert engine._engine.is_sleeping()
    with pytest.raises(AssertionError, match="its weights may be anything"):
        sample_all(engine)
    with engine.awake(model):
        assert not engine._engine.is_sleeping()
        assert len(sample_all(engine)) == len(PROMPTS)
    assert engine._engine.is_sleeping()


def test_a_file_of_older_weights_is_noticed_and_nothing_is_sampled(pair, monkeypatch) -> None:
    model, engine = pair
    with weights_file(model, torch.float32) as (older, _):
        move(model, 7)

        @contextmanager
        def mixed_up(*arguments) -> Iterator[tuple[Path, dict[str, str]]]:
            with weights_file(*arguments) as (_, digests):
                yield older, digests

        monkeypatch.setattr("camopd.engines.colocated.weights_file", mixed_up)
        with pytest.raises(EngineError, match=r"process 0 of vLLM samples with other weights .* (\d+) of \1 tensors differ"):
            engine.awake(model).__enter__()
    monkeypatch.undo()
    engine._engine.sleep(level=2)
    with engine.awake(model):
        assert gap(model, sample_all(engine)) < 1e-4


def test_weights_that_were_given_and_not_taken_are_noticed(pair) -> None:
    """The workers look at what they compute with: on CPUs norms and embeddings, the rest is packed away."""
    model, engine = pair
    with engine.awake(model):
        move(model, 8)
        with weights_file(model, torch.float32) as (path, expected):
            (found,) = engine._engine.collective_rpc("camopd_digests", args=(str(path),))
    with pytest.raises(EngineError, match=r"model\.embed_tokens\.weight"):
        check_taken(expected, found, 0)
    differing = {name for name in expected if expected[name] != found[name]}
    assert differing >= {name for name in expected if "norm" in name}
    with engine.awake(model):
        assert gap(model, sample_all(engine)) < 1e-4


def test_what_vllm_cannot_take_is_one_clear_error(pair) -> None:
    _, engine = pair
    stranger = model_of(tied=True)
    stranger.unknown = torch.nn.Linear(2, 2)
    with pytest.raises(
        EngineError, match=r"did not take over the trainer's weights: .* no module or parameter named 'unknown'"
    ):
        engine.awake(stranger).__enter__()


# --- A whole recovery -----------------------------------------------------------------------------------------------------

WISH = {
    "execution": "colocated",
    "rollout.engine": "vllm",
    "vllm.dtype": "float32",
    "vllm.gpu_memory_utilization": "0.5",
    "vllm.enforce_eager": "true",
    "num_rounds": "2",
    "steps_per_round": "3",
    "rollout.prompts_per_step": "8",
    "rollout.max_empty_fraction": "1",
    "train.learning_rate": "2e-3",
}


def prepared(output: Path, **settings: str) -> Plan:
    store = Store()
    return Plan.load(store, workflow.prepare("micro", {**WISH, "output": str(output), **settings}, store=store).uri)


def steps_of(plan: Plan) -> list[dict[str, Any]]:
    """The records of every update."""
    return [step for uri in plan.rounds for step in json.loads(Path(layout.checkpoint_uri(uri), "steps.json").read_text())]


def test_a_recovery_beside_vllm_is_on_policy_at_every_update(tmp_path) -> None:
    """Also in a round that a later start adds; with the student's own top k, which vLLM gives and the teacher scores."""
    signal = {"score.signal": "topk", "score.top_k_of": "student"}
    plan = prepared(tmp_path, **signal)
    workflow.recover(plan.rounds[-1])
    first = [Store().require(layout.checkpoint_uri(uri)).content_id for uri in plan.rounds]
    plan = prepared(tmp_path, **signal, num_rounds="3")
    done = workflow.recover(plan.rounds[-1])
    assert [Store().require(layout.checkpoint_uri(uri)).content_id for uri in plan.rounds[:2]] == first
    steps = steps_of(plan)
    assert len(steps) == 9
    assert max(step["engine_gap"] for step in steps) < 1e-4, "rounding, after each of eight refreshes"
    assert min(step["kept_ratio"] for step in steps) == 1, "no token is masked for its ratio"
    assert sum(step["grad_norm"] > 0 for step in steps) >= 6
    assert done.metrics["num_steps"] == 3


def test_a_domain_model_that_is_an_adapter(tmp_path) -> None:
    """vLLM starts with its base and gets what the trainer makes of both: a merged model, whose weights all learn."""
    general = ROOT / "examples" / "micro" / "general"
    adapter = save_adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(general), rank=2, alpha=1.0)
    wish = {"student": str(adapter), "base": str(general), "train.learning_rate": "1e-3"}
    plan = prepared(tmp_path / "runs", **wish)
    workflow.recover(plan.rounds[-1])
    steps = steps_of(plan)
    assert len(steps) == 6
    assert max(step["engine_gap"] for step in steps) < 1e-4
    gaps = [step["branches"][name]["gap"] for step in steps for name in step["branches"]]
    assert max(gaps) > 0.01, "the adapter makes it another model than its base, which is the general teacher"


def test_the_last_guard_stops_a_run_that_samples_from_old_weights(tmp_path, monkeypatch) -> None:
    """An engine that wakes up with what it had, and says nothing: vLLM keeps its weights on CPUs."""

    @contextmanager
    def as_it_was(engine, model) -> Iterator[None]:
        engine._engine.wake_up()
        engine._asleep = False
        yield
        engine._asleep = True
        engine._engine.sleep(level=2)

    monkeypatch.setattr("camopd.engines.colocated.ColocatedVllm.awake", as_it_was)
    plan = prepared(tmp_path, **{"train.learning_rate": "2e-2"})
    with pytest.raises(UnhealthyRunError, match=r"on fresh rollouts, above train\.max_engine_gap = 0\.1"):
        workflow.recover(plan.rounds[-1])
    with pytest.raises(UnhealthyRunError, match="stopped itself"):
        workflow.recover(plan.rounds[-1])
