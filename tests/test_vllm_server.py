"""A teacher served by vLLM's own server, for real, in float32 on a CPU. `make test-vllm` runs these."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from camopd.config import load_recipe
from camopd.engines import load_engine
from camopd.engines.remote import RemoteEngine
from camopd.engines.served import Server
from camopd.errors import EngineError
from camopd.inputs.served import connect, examine
from camopd.store import Store

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")]

ROOT = Path(__file__).parents[1]
GENERAL = ROOT / "examples" / "micro" / "general"
VOCAB, LONGEST = 261, 127  # of 128 positions one is for the token that vLLM samples after a prompt
ENDS = [220]  # a blank, which this model likes to write
KEY = "a-key-of-the-test"
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(5, VOCAB, size).tolist() for size in (1, 3, 40, 100)]
RESPONSES = [RANDOM.integers(5, VOCAB, size).tolist() for size in (1, 17, 60, 27)]


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """The base address of a server that started, which takes some 20 seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    settings = {"model": GENERAL, "served-model-name": "teacher", "host": "127.0.0.1", "port": port, "dtype": "float32"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def engine(url, monkeypatch) -> Iterator[RemoteEngine]:
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", KEY)
    limits = {"vocab_size": VOCAB, "batch_size": 8, "batch_tokens": 200, "max_length": LONGEST}
    with closing(RemoteEngine(Server(url), "teacher", **limits)) as found:
        yield found


@pytest.fixture(scope="module")
def local():
    return load_engine("transformers", GENERAL, vocab_size=VOCAB, batch_size=8, batch_tokens=200, max_length=128)


@pytest.mark.parametrize("top_k", [0, 8, 20])
def test_a_server_scores_as_the_engine_does(engine, local, top_k) -> None:
    found, expected = (dict(one.score(PROMPTS * 3, RESPONSES * 3, top_k=top_k)) for one in (engine, local))
    assert sorted(found) == list(range(12))
    for index, scores in found.items():
        assert scores.logprobs == pytest.approx(expected[index].logprobs, abs=1e-3)
        assert scores.topk_logprobs == pytest.approx(expected[index].topk_logprobs, abs=1e-3)
        certain = np.diff(expected[index].topk_logprobs, axis=1, append=-np.inf) < -1e-3  # no tie within precision
        assert (scores.topk_ids == expected[index].topk_ids)[certain & np.roll(certain, 1, axis=1)].all()


def test_what_a_server_samples_has_the_log_probabilities_that_it_says(engine, local) -> None:
    samples = dict(engine.sample(PROMPTS * 5, range(20), max_new_tokens=3, eos_ids=ENDS))
    responses = [samples[index].token_ids for index in range(20)]
    scores = dict(local.score(PROMPTS * 5, responses))
    assert {sample.finish_reason for sample in samples.values()} == {"stop", "length"}
    for index, sample in samples.items():
        assert sample.logprobs == pytest.approx(scores[index].logprobs, abs=1e-3)
        assert (sample.token_ids[-1] in ENDS) == (sample.finish_reason == "stop")


def test_the_greedy_answer_is_the_likeliest(engine, local) -> None:
    answers = engine.greedy(PROMPTS, max_new_tokens=12, eos_ids=ENDS, stop=[])
    for index, scores in local.score(PROMPTS, answers, top_k=1):
        assert scores.topk_ids[:, 0].tolist() == answers[index].tolist()


def test_a_recipe_with_this_teacher_passes_every_check_and_the_model_is_known_again(url, monkeypatch) -> None:
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", KEY)
    recipe = load_recipe(ROOT / "recipes" / "micro.toml", {"branches.general.teacher": url})
    found, problems = examine(recipe, Store())
    assert not problems
    assert found[url].max_length == LONGEST
    connect(url, recipe, vocab_size=VOCAB, longest=LONGEST, expected=found[url].probe).close()
    too_many = load_recipe(ROOT / "recipes" / "micro.toml", {"branches.general.teacher": url, "score.top_k": 30})
    (problem,) = examine(too_many, Store())[1]
    assert "the 30 most likely tokens cannot be had" in problem.what
    assert "--max-logprobs 30" in problem.fix


def test_what_the_server_refuses_is_said(url, engine, monkeypatch) -> None:
    engine.max_length = 500
    with pytest.raises(EngineError, match=r"/v1/completions refuses \(status 400\): .*128"):
        list(engine.score([[5] * 100], [[6] * 100]))
    monkeypatch.delenv("CAMOPD_TEACHER_API_KEY")
    with pytest.raises(EngineError, match="refuses the key"):
        Server(url).models()
