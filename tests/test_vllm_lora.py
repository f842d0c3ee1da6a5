"""Adapters in vLLM for real, in float32 on a CPU, against merged weights in float64. `make test-vllm` runs these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camopd.engines import Engine, load_engine
from camopd.engines.shared import open_engines
from tests.test_vllm_engine import (
    MAX_LENGTH,
    PROMPTS,
    RESPONSES,
    SEEDS,
    SETTINGS,
    SHARED,
    exact_logprobs,
    of_tokens,
    padded_model,
)
from tests.tiny import EOS, merged, save_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")]
OPTIONS: dict[str, Any] = {
    "vocab_size": SHARED,
    "batch_size": 8,
    "batch_tokens": 24,
    "max_length": MAX_LENGTH,
    "vllm": SETTINGS,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path | None]:
    """The base and two adapters of it, of different ranks, one with layers that the other has not."""
    root = tmp_path_factory.mktemp("adapters")
    padded_model().save_pretrained(root / "base")
    layers = padded_model()
    for layer in layers.model.layers:
        layer.mlp = None
    b = save_adapter(root / "b", layers, 6, rank=9, use_rslora=True)
    return {"base": None, "a": save_adapter(root / "a", padded_model(), 5), "b": b}


@pytest.fixture(scope="module")
def engines(folders) -> Iterator[dict[str, Engine]]:
    with open_engines("vllm", folders["a"].parent / "base", folders, **OPTIONS) as found:
        yield found


def reference(name: str, folders: dict[str, Path | None]) -> Any:
    folder = folders[name]
    return merged(padded_model().double(), folder) if folder else padded_model()


@pytest.mark.parametrize("name", ["base", "a", "b"])
@pytest.mark.parametrize("top_k", [0, 4])
def test_scores_are_those_of_the_merged_weights(name, top_k, engines, folders) -> None:
    for index, scores in engines[name].score(PROMPTS, RESPONSES, top_k=top_k):
        exact = exact_logprobs(PROMPTS[index], RESPONSES[index], model=reference(name, folders))
        values, ids = exact.topk(top_k)
        assert scores.logprobs == pytest.approx(of_tokens(exact, RESPONSES[index]), abs=1e-4)
        assert scores.topk_ids.tolist() == ids.tolist()
        assert scores.topk_logprobs == pytest.approx(values.numpy(), abs=1e-4)


@pytest.mark.parametrize("name", ["base", "a", "b"])
def test_samples_are_those_of_the_merged_weights(name, engines, folders) -> None:
    for index, sample in engines[name].sample(PROMPTS, SEEDS, max_new_tokens=8, eos_ids=(EOS,)):
        exact = exact_logprobs(PROMPTS[index], sample.token_ids, model=reference(name, folders))
        assert sample.logprobs == pytest.approx(of_tokens(exact, sample.token_ids), abs=1e-4)
        assert sample.token_ids.max() < SHARED


def test_the_models_differ(engines) -> None:
    """Else the tests above could not fail."""
    found = [
        np.concatenate([own.logprobs for _, own in sorted(engine.score(PROMPTS, RESPONSES))]) for engine in engines.values()
    ]
    gaps = [np.abs(first - second).max() for i, first in enumerate(found) for second in found[:i]]
    assert min(gaps) > 0.1


def test_two_copies_of_a_base_with_an_adapter(folders) -> None:
    folder = folders["b"]
    with closing(load_engine("vllm", folders["a"].parent / "base", adapter=folder, replicas=2, **OPTIONS)) as copies:
        scores = dict(copies.score(PROMPTS * 3, RESPONSES * 3))
        samples = dict(copies.sample(PROMPTS * 3, range(15), max_new_tokens=8, eos_ids=(EOS,)))
    assert sorted(scores) == sorted(samples) == list(range(15))
    for index in range(15):
        for response, found in ((RESPONSES[index % 5], scores[index]), (samples[index].token_ids, samples[index])):
            exact = exact_logprobs(PROMPTS[index % 5], response, model=reference("b", folders))
            assert found.logprobs == pytest.approx(of_tokens(exact, response), abs=1e-4)


def test_one_adapter_by_itself_and_the_next_round_s(folders, tmp_path) -> None:
    """As `rollout` opens the student: a new engine each round, so no older adapter can be left in a cache."""
    for seed in (11, 12):
        folder = save_adapter(tmp_path / str(seed), padded_model(), seed)
        with closing(load_engine("vllm", folders["a"].parent / "base", adapter=folder, **OPTIONS)) as engine:
            ((_, scores),) = engine.score(PROMPTS[:1], RESPONSES[:1])
        exact = exact_logprobs(PROMPTS[0], RESPONSES[0], model=merged(padded_model().double(), folder))
        assert scores.logprobs == pytest.approx(of_tokens(exact, RESPONSES[0]), abs=1e-4)
