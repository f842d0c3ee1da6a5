"""Two processes with a copy of the model each, against one engine in this process: the same numbers to the last bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from camopd.engines import Engine, load_engine
from camopd.engines.replica_worker import pack, unpack
from camopd.engines.replicas import visible_devices
from camopd.errors import EngineError, InputError
from tests.tiny import EOS, VOCAB, save_adapter, save_tiny, tiny_model

SHARED = VOCAB - 4
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(3, SHARED, RANDOM.integers(1, 12)).astype(np.int32) for _ in range(60)]
RESPONSES = [RANDOM.integers(3, SHARED, RANDOM.integers(1, 20)).astype(np.int32) for _ in range(60)]
SEEDS = [2**64 - 1 - 977 * number for number in range(60)]
SAMPLING = {"max_new_tokens": 12, "eos_ids": [EOS], "top_k": 3}


def start(folder: Path, replicas: int, adapter: Path | None = None) -> Engine:
    limits = {"vocab_size": SHARED, "batch_size": 7, "batch_tokens": 64, "max_length": 128}
    return load_engine("transformers", folder, **limits, adapter=adapter, replicas=replicas)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def both(folder) -> Iterator[tuple[Engine, Engine]]:
    """One engine here and two copies in processes, on one thread each: sums have one order."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    with closing(start(folder, 2)) as copies:
        yield start(folder, 1), copies
    torch.set_num_threads(usual)


def same(left, right) -> bool:
    names = [name for name in ("token_ids", "logprobs", "topk_ids", "topk_logprobs") if hasattr(left, name)]
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


@pytest.mark.slow
def test_two_copies_sample_what_one_samples(both) -> None:
    one, two = (dict(engine.sample(PROMPTS, SEEDS, **SAMPLING)) for engine in both)
    assert sorted(two) == list(range(60))
    for index, sample in one.items():
        assert same(sample, two[index])
        assert (sample.entropy, sample.finish_reason) == (two[index].entropy, two[index].finish_reason)
    assert {sample.finish_reason for sample in two.values()} == {"stop", "length"}


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [0, 4])
def test_two_copies_score_as_one_does(both, top_k) -> None:
    one, two = (dict(engine.score(PROMPTS, RESPONSES, top_k=top_k)) for engine in both)
    assert sorted(two) == list(range(60))
    assert all(same(scores, two[index]) for index, scores in one.items())
    assert all(scores.topk_ids.shape == (len(RESPONSES[index]), top_k) for index, scores in two.items())


@pytest.mark.slow
def test_given_ids_reach_the_copy_that_scores_their_response(both) -> None:
    ids = [RANDOM.integers(0, SHARED, (len(response), 3)).astype(np.int32) for response in RESPONSES]
    one, two = (dict(engine.score(PROMPTS, RESPONSES, ids=ids)) for engine in both)
    assert all(same(scores, two[index]) and np.array_equal(two[index].topk_ids, ids[index]) for index, scores in one.items())


@pytest.mark.slow
def test_results_that_nobody_waits_for_any_more_do_not_come_with_later_ones(both) -> None:
    engine = both[1]
    some = engine.sample(PROMPTS, SEEDS, **SAMPLING)
    next(some)
    some.close()
    expected = dict(both[0].score(PROMPTS[:9], RESPONSES[:9]))
    found = dict(engine.score(PROMPTS[:9], RESPONSES[:9]))
    assert sorted(found) == list(range(9))
    assert all(same(scores, found[index]) for index, scores in expected.items())


@pytest.mark.slow
def test_no_requests_are_no_results(both) -> None:
    assert list(both[1].sample([], [], **SAMPLING)) == list(both[1].score([], [])) == []


@pytest.mark.slow
def test_copies_of_a_base_with_an_adapter_are_that_model(both, folder, tmp_path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_model())
    one = start(folder, 1, adapter)
    with closing(start(folder, 2, adapter)) as two:
        ours, theirs = (dict(engine.score(PROMPTS, RESPONSES, top_k=2)) for engine in (one, two))
        assert sorted(theirs) == list(range(60))
        assert all(same(scores, theirs[index]) for index, scores in ours.items())
        samples = dict(two.sample(PROMPTS, SEEDS, **SAMPLING))
        assert all(same(sample, samples[index]) for index, sample in one.sample(PROMPTS, SEEDS, **SAMPLING))
    bare = dict(both[0].score(PROMPTS, RESPONSES))
    assert max(np.abs(scores.logprobs - bare[index].logprobs).max() for index, scores in theirs.items()) > 0.1


@pytest.mark.slow
def test_a_copy_that_is_killed_ends_all_with_one_sentence(folder) -> None:
    before = set(psutil.Process().children())
    with closing(start(folder, 2)) as engine:
        copies = set(psutil.Process().children()) - before
        results = engine.sample(PROMPTS, SEEDS, max_new_tokens=60, eos_ids=[])
        next(results)
        os.kill(max(copies, key=lambda process: process.pid).pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"replica 2 of 2 was killed, as happens where memory runs out"):
            list(results)
        assert not any(process.is_running() for process in copies)


@pytest.mark.slow
def test_what_loading_finds_is_said_once_and_nothing_stays(tmp_path, capfd) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    before = psutil.Process().children()
    with pytest.raises(InputError, match=r"1 problem found.*\n.*model\.norm\.weight holds NaN"):
        start(tmp_path, 2)
    assert psutil.Process().children() == before
    assert "Traceback" not in capfd.readouterr().err


def test_a_message_holds_its_header_and_its_arrays() -> None:
    arrays = [np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros((4, 0), np.float32), np.array(SEEDS, np.uint64)]
    header, found = unpack(pack({"index": 3, "entropy": 0.1}, arrays))
    assert header == {"index": 3, "entropy": 0.1}
    for ours, theirs in zip(arrays, found, strict=True):
        assert (ours.dtype, ours.tolist()) == (theirs.dtype, theirs.tolist())
        assert theirs.flags.writeable


def test_each_copy_sees_its_own_gpus_and_too_few_are_said_before_loading(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices(2, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,7")
    assert visible_devices(3, 1) == [{"CUDA_VISIBLE_DEVICES": name} for name in ("GPU-a", "GPU-b", "7")]
    with pytest.raises(InputError, match=r"rollout\.replicas: 2 replicas with 2 each need 4 GPUs, and there are 3"):
        visible_devices(2, 2)


def test_a_machine_without_gpus_shares_its_processors() -> None:
    assert torch.cuda.is_available() or visible_devices(3, 2) == [{}, {}, {}]
