"""A served teacher, against a plain forward pass: with a server that answers rightly, and with one that does not."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

from camopd.engines import remote, served
from camopd.engines.remote import RemoteEngine, in_flight
from camopd.engines.served import Server
from camopd.errors import EngineError
from tests.fixtures.completions import RESET, Completions, Refused, serve
from tests.tiny import EOS, VOCAB, tiny_model

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [5, 4], [9, 9, 9, 9]]
RESPONSES = [[4, 5, 2], [6, 7, 8, 9, 2], [3], [2], [15, 14, 13, 12]]


@pytest.fixture
def server(monkeypatch) -> Iterator[Completions]:
    monkeypatch.setattr(served, "BACKOFF", 0.01)
    monkeypatch.setattr(served, "ATTEMPTS", 3)
    with serve(Completions(tiny_model())) as found:
        yield found


@pytest.fixture
def engine(server) -> Iterator[RemoteEngine]:
    with closing(start(server)) as found:
        yield found


def start(server: Completions, **limits: int) -> RemoteEngine:
    limits = {"vocab_size": VOCAB, "batch_size": 4, "batch_tokens": 24, "max_length": 128} | limits
    return RemoteEngine(Server(server.url), "teacher", **limits)


def exact_logprobs(prompt, response) -> torch.Tensor:
    with torch.no_grad():
        logits = tiny_model().double()(torch.tensor([[*prompt, *response]]), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def of_tokens(logprobs_LV: torch.Tensor, response) -> np.ndarray:
    return logprobs_LV.gather(1, torch.tensor(np.array(response), dtype=torch.long)[:, None]).squeeze(1).numpy()


def completions(server: Completions) -> int:
    return sum(path == "/v1/completions" for path, _, _ in server.asked)


# --- Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 3, 20])
def test_scores_equal_a_plain_forward_pass(engine, top_k) -> None:
    found = dict(engine.score(PROMPTS * 3, RESPONSES * 3, top_k=top_k))
    assert sorted(found) == list(range(15))
    for index, scores in found.items():
        exact = exact_logprobs(PROMPTS[index % 5], RESPONSES[index % 5])
        values, ids = exact.topk(top_k)
        assert scores.logprobs == pytest.approx(of_tokens(exact, RESPONSES[index % 5]), abs=1e-4)
        assert scores.topk_ids.tolist() == ids.tolist()
        assert scores.topk_logprobs == pytest.approx(values.numpy(), abs=1e-4)
        assert (scores.logprobs.dtype, scores.topk_ids.dtype, scores.topk_logprobs.dtype) == (np.float32, np.int32, np.float32)


def test_sampled_logprobs_equal_a_plain_forward_pass_and_answers_end_where_they_should(engine, server) -> None:
    ends = [EOS, 3, 4]
    samples = dict(engine.sample(PROMPTS * 4, range(20), max_new_tokens=6, eos_ids=ends))
    assert sorted(samples) == list(range(20))
    assert {sample.finish_reason for sample in samples.values()} == {"stop", "length"}
    for index, sample in samples.items():
        assert sample.logprobs == pytest.approx(
            of_tokens(exact_logprobs(PROMPTS[index % 5], sample.token_ids), sample.token_ids), abs=1e-4
        )
        assert sample.entropy == pytest.approx(-sample.logprobs.mean())
        assert (sample.token_ids[-1] in ends) == (sample.finish_reason == "stop")
        assert sample.topk_ids.shape == (len(sample.token_ids), 0)
    bodies = [body for _, _, body in server.asked]
    assert {(body["temperature"], body["top_p"], body["top_k"], body["ignore_eos"]) for body in bodies} == {(1.0, 1.0, 0, True)}
    assert {body["seed"] for body in bodies} == set(range(20))


def test_the_greedy_answer_is_the_most_likely_one(engine) -> None:
    for prompt, answer in zip(PROMPTS, engine.greedy(PROMPTS, max_new_tokens=5, eos_ids=[EOS], stop=[]), strict=True):
        assert answer.tolist() == exact_logprobs(prompt, answer).argmax(-1).tolist()


def test_no_more_tokens_are_in_flight_than_the_budget(server) -> None:
    server.delay = 0.02
    list(start(server, batch_tokens=20).score(PROMPTS * 4, RESPONSES * 4))
    assert 11 < server.together <= 20


def test_jobs_run_beside_each_other_within_the_budget_and_a_larger_one_alone() -> None:
    now, most = [], []

    def answer(index: int) -> int:
        now.append(index)
        most.append(sum(costs[i] for i in now))
        time.sleep(0.01)
        now.remove(index)
        return -index

    costs = [9, 3, 3, 2, 1, 1, 30]
    assert dict(in_flight(list(enumerate(costs)), 9, answer)) == {index: -index for index in range(7)}
    assert sorted(set(most))[-2:] == [9, 30]


# --- Patience -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [Refused(503), Refused(500), Refused(429), RESET, Refused(502, headers={"Connection": "close"})], ids=str
)
def test_what_passes_is_waited_for(engine, server, fault) -> None:
    server.faults = deque([fault, fault])
    ((_, scores),) = engine.score(PROMPTS[:1], RESPONSES[:1])
    assert scores.logprobs == pytest.approx(of_tokens(exact_logprobs(PROMPTS[0], RESPONSES[0]), RESPONSES[0]), abs=1e-4)
    assert completions(server) == 3


def test_a_server_that_says_how_long_is_believed(engine, server) -> None:
    server.faults = deque([Refused(429, headers={"Retry-After": "1"})])
    begun = time.monotonic()
    assert len(list(engine.score(PROMPTS[:1], RESPONSES[:1]))) == 1
    assert time.monotonic() - begun >= 1


def test_what_does_not_pass_is_said(engine, server) -> None:
    server.faults = deque([Refused(503, "the engine is dead")] * 4)
    with pytest.raises(EngineError, match="still answers with status 503 after 4 attempts: the engine is dead; see the"):
        list(engine.score(PROMPTS[:1], RESPONSES[:1]))
    assert completions(server) == 4


def test_a_request_that_is_wrong_is_not_repeated(server) -> None:
    server.max_model_len = 6
    with pytest.raises(EngineError, match=r"refuses \(status 400\): This model's maximum context length is 6 tokens"):
        list(start(server).score(PROMPTS[1:2], RESPONSES[1:2]))
    assert completions(server) == 1


def test_a_slow_server_is_said_with_its_time(server, monkeypatch) -> None:
    monkeypatch.setattr(served, "ANSWER", 0.2)
    monkeypatch.setattr(served, "ATTEMPTS", 1)
    server.delay = 2
    with pytest.raises(EngineError, match=r"gives no answer in 2 attempts: Read timed out. \(read timeout=0.2\); see that"):
        list(start(server).score(PROMPTS[:1], RESPONSES[:1]))


def test_a_server_that_is_not_there_is_said(server, monkeypatch) -> None:
    with pytest.raises(EngineError, match=r"http://127.0.0.1:1/v1/models gives no answer in 4 attempts: .*[Rr]efused"):
        Server("http://127.0.0.1:1/v1").models()


def test_the_key_comes_from_the_environment_and_is_in_no_message(server, monkeypatch) -> None:
    server.key = "s3cr3t"
    with pytest.raises(EngineError, match=r"refuses the key \(status 401\); set CAMOPD_TEACHER_API_KEY") as caught:
        list(start(server).score(PROMPTS[:1], RESPONSES[:1]))
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "s3cr3t")
    assert len(list(start(server).score(PROMPTS[:1], RESPONSES[:1]))) == 1
    server.faults = deque([Refused(400, "no")])
    with pytest.raises(EngineError) as refused:
        list(start(server).score(PROMPTS[:1], RESPONSES[:1]))
    assert "s3cr3t" not in f"{caught.value} {refused.value}"


# --- Answers that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"shift": 1}, "did not take the token ids as they are"),
        ({"shift": 1, "without": ("prompt_token_ids",)}, "log-probabilities of other tokens than those that were sent"),
        ({"without": ("prompt_logprobs",)}, "gives no prompt_logprobs; a served teacher needs them"),
        ({"noise": 0.5}, "no log-probability: above 0|sum is above 1"),
        ({"noise": float("nan")}, "no log-probability"),
        ({"noise": 20.0}, "no log-probability: above 0"),
    ],
)
def test_what_is_no_score_is_refused_with_one_sentence(server, wrong, sentence) -> None:
    for name, value in wrong.items():
        setattr(server, name, value)
    with pytest.raises(EngineError, match=sentence):
        list(start(server).score(PROMPTS, RESPONSES, top_k=0 if "shift" in wrong else VOCAB - 4))


def test_an_id_that_the_student_has_not_is_refused_where_it_is_likely(server) -> None:
    with pytest.raises(EngineError, match=r"finds the id \d+ likely, which the student's tokenizer does not have"):
        list(start(server, vocab_size=10).score([[3]] * 20, [[4, 5, 6]] * 20, top_k=5))


def test_a_sampler_must_say_which_tokens_it_wrote(server) -> None:
    server.without = ("token_ids",)
    with pytest.raises(EngineError, match="gave no token_ids with its answer"):
        list(start(server).sample(PROMPTS, range(5), max_new_tokens=3, eos_ids=[]))


@pytest.mark.parametrize("bad", [[], [3] * 200])
def test_sequences_that_cannot_be_are_named_before_anything_is_asked(engine, server, bad) -> None:
    with pytest.raises(
        EngineError, match=rf"1 of 2 sequences cannot go to http.*, the first with 3 prompt and {len(bad)} response"
    ):
        list(engine.score([PROMPTS[0], PROMPTS[0]], [[4], bad]))
    assert not server.asked


def test_given_ids_hidden_states_and_top_tokens_of_samples_are_refused(engine) -> None:
    for wrong in ({"ids": [np.zeros((3, 2), np.int32)]}, {"hidden": True}):
        with pytest.raises(ValueError, match="give the model's folder"):
            list(engine.score(PROMPTS[:1], RESPONSES[:1], **wrong))
    with pytest.raises(ValueError, match="not asked for the most likely"):
        list(engine.sample(PROMPTS[:1], [1], max_new_tokens=1, eos_ids=[], top_k=2))
    assert remote.PLAIN["temperature"] == 1.0
