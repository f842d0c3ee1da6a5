"""The engines on the device: what was sampled is what is scored, and the trainer agrees; memory that is given back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from camopd.config import VLLM
from camopd.engines import Engine, load_engine
from camopd.engines.transformers import load_model
from camopd.student import Student
from camopd.update import make_optimizer, update
from camopd.workers import run_workers
from tests.in_workers import make_plan, rounds
from tests.test_engines import PROMPTS, SEEDS, SHARED, exact_logprobs
from tests.test_student import assert_same, assert_same_records, checkpoint
from tests.tiny import EOS, save_tiny

LIMITS = {"batch_size": 5, "batch_tokens": 64, "max_length": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, where):
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_what_was_sampled_is_what_is_scored_and_what_float64_says(folder) -> None:
    engine = load_engine("transformers", folder, vocab_size=SHARED, **LIMITS)
    samples = dict(engine.sample(PROMPTS, SEEDS, max_new_tokens=12, eos_ids=[EOS], top_k=3))
    scores = dict(engine.score(PROMPTS, [samples[i].token_ids for i in range(len(PROMPTS))], top_k=3))
    for index, sample in samples.items():
        exact = exact_logprobs(PROMPTS[index], sample.token_ids)
        own = exact.gather(1, torch.tensor(sample.token_ids, dtype=torch.long)[:, None]).squeeze(1).numpy()
        assert sample.logprobs == pytest.approx(own, abs=1e-4)
        assert scores[index].logprobs == pytest.approx(own, abs=1e-4)
        assert scores[index].topk_logprobs == pytest.approx(exact.topk(3).values.numpy(), abs=1e-4)


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_gap_between_engine_and_trainer_is_small(folder, where, precision, limit) -> None:
    engine = load_engine("transformers", folder, vocab_size=SHARED, **LIMITS)
    plan = make_plan("/runs/x", str(folder), "sampled", {"precision": precision})
    model = load_model(folder)
    assert model.device.type == where.type
    samples = dict(engine.sample(PROMPTS, SEEDS, max_new_tokens=12, eos_ids=[EOS]))
    rows = [
        {
            "branch": "general",
            "prompt_ids": np.array(PROMPTS[i], np.int32),
            "response_ids": sample.token_ids,
            "logprobs": sample.logprobs,
            "teacher_logprobs": sample.logprobs - 0.5,
        }
        for i, sample in samples.items()
    ]
    student, optimizer = Student(model, plan.recipe.train), make_optimizer(model, plan.recipe)
    told = update(student, optimizer, rows, recipe=plan.recipe, vocab_size=SHARED)
    assert told["engine_gap"] < limit
    after = update(student, optimizer, rows, recipe=plan.recipe, vocab_size=SHARED)
    assert after["engine_gap"] > told["engine_gap"]  # the weights moved, the rollouts did not


def test_a_closed_engine_gives_its_memory_back(folder, gpu) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated(gpu)
    engine = load_engine("transformers", folder, vocab_size=SHARED, **LIMITS)
    dict(engine.sample(PROMPTS, SEEDS, max_new_tokens=4, eos_ids=[EOS]))
    assert torch.cuda.memory_allocated(gpu) > before
    engine.close()
    gc.collect()
    assert torch.cuda.memory_allocated(gpu) == before


@pytest.mark.slow
def test_two_devices_that_share_the_updates_do_what_one_does(tmp_path, where) -> None:
    """FSDP2 over NCCL where there are two GPUs, over gloo on a CPU."""
    if where.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU: two processes need two")
    given = {"student": str(save_tiny(tmp_path / "student")), "signal": "topk", "numbers": [1]}
    one = rounds(str(tmp_path / "one"), train={}, **given)
    shared = {"run_uri": str(tmp_path / "two"), "train": {"num_processes": 2}, **given}
    assert_same_records(one, run_workers("tests.in_workers:rounds", shared, num_processes=2))
    if where.type == "cpu":  # on GPUs another order of sums turns the sign of first steps whose gradient is nothing
        assert_same(checkpoint(tmp_path / "one", 1), checkpoint(tmp_path / "two", 1))


# --- vLLM -----------------------------------------------------------------------------------------------------------------

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")


@pytest.fixture
def vllm(tmp_path, where) -> Iterator[Engine]:
    path = save_tiny(tmp_path, head_dim=64)  # flash attention's least width of a head that all versions have
    settings = VLLM(dtype="bfloat16", gpu_memory_utilization=0.3, enforce_eager=True)
    with closing(load_engine("vllm", path, vocab_size=SHARED, vllm=settings, **LIMITS)) as found:
        yield found


@pytest.mark.vllm
@needs_vllm
def test_what_vllm_samples_is_what_it_scores(vllm) -> None:
    samples = dict(vllm.sample(PROMPTS, SEEDS, max_new_tokens=12, eos_ids=[EOS]))
    scores = dict(vllm.score(PROMPTS, [samples[i].token_ids for i in range(len(PROMPTS))]))
    differences = np.concatenate([np.abs(samples[i].logprobs - scores[i].logprobs) for i in samples])
    assert differences.mean() < 0.05  # seen in bfloat16 on CPUs: 0.014 nats a token


@pytest.mark.vllm
@needs_vllm
def test_closing_vllm_gives_the_device_back(tmp_path, gpu) -> None:
    before = torch.cuda.mem_get_info(gpu)[0]
    settings = VLLM(dtype="bfloat16", gpu_memory_utilization=0.3, enforce_eager=True)
    engine = load_engine("vllm", save_tiny(tmp_path, head_dim=64), vocab_size=SHARED, vllm=settings, **LIMITS)
    held = before - torch.cuda.mem_get_info(gpu)[0]
    assert held > 0.1 * torch.cuda.mem_get_info(gpu)[1]
    engine.close()
    assert before - torch.cuda.mem_get_info(gpu)[0] < 0.01 * torch.cuda.mem_get_info(gpu)[1]
