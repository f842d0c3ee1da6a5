"""The vLLM engine for real, in float32 on a CPU, against a plain forward pass in float64. `make test-vllm` runs these."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from camopd.config import VLLM
from camopd.engines import Engine, load_engine
from camopd.errors import EngineError, InputError
from tests.tiny import EOS, tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")]

VOCAB, SHARED = 64, 60  # the last four rows of the head are padding
MAX_LENGTH = 48
SETTINGS = VLLM(dtype="float32", gpu_memory_utilization=0.5, enforce_eager=True)
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [5, 4], [9, 9, 9, 9]]
SEEDS = [11, 12, 13, 14, 2**64 - 1]
RESPONSES = [[4, 5, 2], [6, 7, 8, 9, 2], [3], [2], [15, 14, 13, 12]]


def padded_model():
    """A model that would nearly always give the padding of its head, if that were not masked."""
    model = tiny_model(vocab_size=VOCAB, head_dim=32, max_length=MAX_LENGTH)  # vLLM needs heads of 32
    with torch.no_grad():
        model.model.embed_tokens.weight[SHARED:] *= 6
    return model


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("model")
    padded_model().save_pretrained(folder)
    with closing(start(folder)) as found:
        yield found


def start(folder: Path, *, vocab_size: int = SHARED, batch_tokens: int = 24, max_length: int = MAX_LENGTH) -> Engine:
    return load_engine(
        "vllm", folder, vocab_size=vocab_size, batch_size=8, batch_tokens=batch_tokens, max_length=max_length, vllm=SETTINGS
    )


def exact_logprobs(prompt, response, vocab_size: int = SHARED, model=None) -> torch.Tensor:
    """Log-probabilities (L, vocab_size) in float64, one sequence, over the shared ids alone."""
    model = (model or padded_model()).double()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1, :vocab_size]
    return logits.log_softmax(-1)


def of_tokens(logprobs_LV: torch.Tensor, response) -> np.ndarray:
    return logprobs_LV.gather(1, torch.tensor(np.array(response), dtype=torch.long)[:, None]).squeeze(1).numpy()


def sample_all(engine, prompts=PROMPTS, seeds=SEEDS, *, limit=12, eos=(EOS,), top_k=0):
    return dict(engine.sample(prompts, seeds, max_new_tokens=limit, eos_ids=eos, top_k=top_k))


# --- Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 4, 40])
def test_sampled_logprobs_and_top_tokens_equal_a_plain_forward_pass(engine, top_k) -> None:
    """40 is more than vLLM gives unless it is told to."""
    for index, sample in sample_all(engine, top_k=top_k).items():
        exact = exact_logprobs(PROMPTS[index], sample.token_ids)
        values, ids = exact.topk(top_k)
        assert sample.logprobs == pytest.approx(of_tokens(exact, sample.token_ids), abs=1e-4)
        assert sample.topk_ids.tolist() == ids.tolist()
        assert sample.topk_logprobs == pytest.approx(values.numpy(), abs=1e-4)
        assert sample.topk_ids.shape == (len(sample.token_ids), top_k)
        assert (sample.token_ids.dtype, sample.logprobs.dtype) == (np.int32, np.float32)
        assert (sample.topk_ids.dtype, sample.topk_logprobs.dtype) == (np.int32, np.float32)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each process wants a core of its own")
def test_a_model_divided_over_two_processes_says_the_same(tmp_path, monkeypatch) -> None:
    """Tensor parallel: half of the heads and half of the vocabulary each, the mask over the whole."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # vLLM would want a NUMA node for each
    padded_model().save_pretrained(tmp_path)
    divided = SETTINGS.model_copy(update={"tensor_parallel_size": 2, "gpu_memory_utilization": 0.3})
    limits = {"vocab_size": SHARED, "batch_size": 8, "batch_tokens": 24, "max_length": MAX_LENGTH}
    with closing(load_engine("vllm", tmp_path, **limits, vllm=divided)) as engine:
        samples, scores = sample_all(engine, top_k=4), dict(engine.score(PROMPTS, RESPONSES, top_k=4))
    for index, response in [*((i, sample.token_ids) for i, sample in samples.items()), *enumerate(RESPONSES)]:
        exact = exact_logprobs(PROMPTS[index], response)
        found = samples[index] if response is samples[index].token_ids else scores[index]
        assert found.logprobs == pytest.approx(of_tokens(exact, response), abs=1e-4)
        assert found.topk_ids.tolist() == exact.topk(4).indices.tolist()


def test_the_entropy_is_an_estimate_whose_mean_is_right(engine) -> None:
    """First tokens of one prompt: their -log p averages to the entropy of the distribution they come from."""
    exact = exact_logprobs(PROMPTS[0], [0])[0]
    entropy = -(exact.exp() * exact).sum().item()
    spread = ((exact.exp() * exact**2).sum().item() - entropy**2) ** 0.5
    drawn = sample_all(engine, PROMPTS[:1] * 400, range(400), limit=1).values()
    assert np.mean([sample.entropy for sample in drawn]) == pytest.approx(entropy, abs=4 * spread / 20)


def test_tokens_are_drawn_with_the_probabilities_that_are_reported(engine) -> None:
    """Pearson's chi-square over the likely tokens; above 60 for 15 degrees of freedom comes by chance once in a million."""
    drawn = np.array([s.token_ids[0] for s in sample_all(engine, PROMPTS[:1] * 1000, range(1000), limit=1).values()])
    probabilities = exact_logprobs(PROMPTS[0], [0])[0].exp().numpy()
    likely = [token for token in probabilities.argsort()[::-1][:15] if probabilities[token] * len(drawn) > 5]
    expected = np.array([*probabilities[likely], 1 - probabilities[likely].sum()]) * len(drawn)
    counts = np.array([*((drawn == token).sum() for token in likely), (~np.isin(drawn, likely)).sum()])
    assert ((counts - expected) ** 2 / expected).sum() < 60


def test_padded_ids_of_the_head_are_never_sampled_and_have_no_part_in_scores(engine) -> None:
    everything = exact_logprobs(PROMPTS[0], RESPONSES[0], VOCAB).exp()
    assert everything[:, SHARED:].sum(-1).max() > 0.5  # unmasked, it would show
    samples = sample_all(engine, PROMPTS * 8, range(40))
    assert max(sample.token_ids.max() for sample in samples.values()) < SHARED
    scores = dict(engine.score(PROMPTS, RESPONSES, top_k=100))
    for score in scores.values():
        assert score.topk_ids.shape[1] == SHARED  # more than the vocabulary holds is the vocabulary
        assert score.topk_ids.max() < SHARED
        assert np.exp(score.topk_logprobs).sum(-1) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("top_k", [0, 3, 40])
def test_scores_equal_a_plain_forward_pass(engine, top_k) -> None:
    """24 tokens at once: the requests go in several batches, and every result has the index of its own."""
    scores = dict(engine.score(PROMPTS * 3, RESPONSES * 3, top_k=top_k))
    assert sorted(scores) == list(range(15))
    for index, score in scores.items():
        exact = exact_logprobs(PROMPTS[index % 5], RESPONSES[index % 5])
        values, ids = exact.topk(top_k)
        assert score.logprobs == pytest.approx(of_tokens(exact, RESPONSES[index % 5]), abs=1e-4)
        assert score.topk_ids.tolist() == ids.tolist()
        assert score.topk_logprobs == pytest.approx(values.numpy(), abs=1e-4)
        assert (score.logprobs.dtype, score.topk_ids.dtype, score.topk_logprobs.dtype) == (np.float32, np.int32, np.float32)


def test_scoring_what_was_sampled_gives_the_sampled_logprobs(engine) -> None:
    samples = sample_all(engine)
    scores = dict(engine.score(PROMPTS, [samples[i].token_ids for i in range(5)]))
    for index, sample in samples.items():
        assert scores[index].logprobs == pytest.approx(sample.logprobs, abs=1e-4)


def test_a_response_depends_on_its_prompt_and_seed_alone(engine) -> None:
    together = [sample_all(engine)[i].token_ids.tolist() for i in range(5)]
    alone = [sample_all(engine, [PROMPTS[i]], [SEEDS[i]])[0].token_ids.tolist() for i in range(5)]
    assert together == alone
    others = sample_all(engine, seeds=[seed - 5 for seed in SEEDS])
    assert [others[i].token_ids.tolist() for i in range(5)] != together


def test_responses_end_at_a_given_end_token_or_at_the_limit(engine) -> None:
    """The model's own end token is not among those given, so it ends nothing."""
    ends = (3, 40, 41, 42, 43, 44, 45)
    samples = sample_all(engine, PROMPTS * 16, range(80), limit=6, eos=ends).values()
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    assert any(EOS in sample.token_ids[:-1] for sample in samples)
    for sample in samples:
        assert (sample.token_ids[-1] in ends) == (sample.finish_reason == "stop")
        assert not set(sample.token_ids[:-1].tolist()) & set(ends)
        assert len(sample.token_ids) == 6 or sample.finish_reason == "stop"


# --- What vLLM would end all requests for ---------------------------------------------------------------------------------


def test_sequences_as_long_as_the_model_allows_are_sampled_and_scored(engine) -> None:
    """vLLM keeps one position free after a prompt; a scored sequence needs all of them."""
    prompt = (PROMPTS[2] * 5)[:30]
    sample = sample_all(engine, [prompt], [1], limit=MAX_LENGTH - 30, eos=())[0]
    assert (len(sample.token_ids), sample.finish_reason) == (MAX_LENGTH - 30, "length")
    score = dict(engine.score([prompt], [sample.token_ids]))[0]
    assert score.logprobs == pytest.approx(of_tokens(exact_logprobs(prompt, sample.token_ids), sample.token_ids), abs=1e-4)


@pytest.mark.parametrize(
    ("bad", "found"), [([], "0 prompt and 12 response"), ([3] * (MAX_LENGTH - 11), f"{MAX_LENGTH - 11} prompt and 12 response")]
)
def test_a_prompt_that_is_empty_or_leaves_no_room_is_named_and_ends_nothing_else(engine, bad, found) -> None:
    with pytest.raises(EngineError, match=f"2 of 4 sequences cannot go to vLLM, the first with {found}"):
        sample_all(engine, [PROMPTS[0], bad, PROMPTS[1], bad], range(4))
    assert len(sample_all(engine)) == 5


@pytest.mark.parametrize("bad", [[], [3] * (MAX_LENGTH - 2)])
def test_a_response_that_is_empty_or_too_long_is_named(engine, bad) -> None:
    with pytest.raises(EngineError, match=f"1 of 2 sequences .* 3 prompt and {len(bad)} response tokens"):
        list(engine.score([PROMPTS[0], PROMPTS[0]], [[4], bad]))


def test_given_ids_and_hidden_states_are_refused(engine) -> None:
    with pytest.raises(ValueError, match="use the transformers engine"):
        list(engine.score(PROMPTS[:1], RESPONSES[:1], ids=[np.zeros((3, 2), np.int32)]))
    with pytest.raises(ValueError, match="use the transformers engine"):
        list(engine.score(PROMPTS[:1], RESPONSES[:1], hidden=True))


def test_requests_that_nobody_waits_for_any_more_are_forgotten(engine) -> None:
    some = engine.sample(PROMPTS * 8, range(40), max_new_tokens=12, eos_ids=[EOS])
    next(some)
    some.close()
    assert sorted(sample_all(engine)) == list(range(5))


# --- Its processes --------------------------------------------------------------------------------------------------------


def vllm_processes() -> set[int]:
    """vLLM's processes below this one, which it names. One that has ended and waits to be read holds nothing any more."""
    import psutil

    found = psutil.Process().children(recursive=True)
    return {p.pid for p in found if p.name().startswith("VLLM") and p.status() != psutil.STATUS_ZOMBIE}


def test_exhaustion_while_scoring_halves_the_tokens_and_at_last_gives_up(tmp_path, monkeypatch) -> None:
    """Real exhaustion: the workers may not grow by 32 MiB, and the log-probabilities of one sequence take 2 x 64 MiB."""
    monkeypatch.setattr("camopd.engines.vllm.MAX_HALVINGS", 1)
    vocab_size, length = 65_536, 256
    model = tiny_model(vocab_size=vocab_size, head_dim=32, max_length=length)
    model.save_pretrained(tmp_path)
    prompts, responses = [[index + 3] * 6 for index in range(6)], [[7 + index] * (length - 6) for index in range(6)]
    exact = [of_tokens(exact_logprobs(*pair, vocab_size, model), pair[1]) for pair in zip(prompts, responses, strict=True)]

    def squeeze() -> None:
        for pid in vllm_processes() - before:
            size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (size + 2**25, size + 2**25))

    before = vllm_processes()
    with closing(start(tmp_path, vocab_size=vocab_size, batch_tokens=2 * length, max_length=length)) as engine:
        squeeze()
        results = engine.score(prompts, responses)
        index, scores = next(results)  # after a restart
        assert scores.logprobs == pytest.approx(exact[index], abs=1e-4)
        assert {index} | {later for later, _ in results} == set(range(6))
        squeeze()
        with pytest.raises(EngineError, match=f"died 2 times while scoring, at last with {length} tokens at once"):
            list(engine.score(prompts, responses))


def test_close_ends_every_process_and_may_come_twice(tmp_path) -> None:
    """Also those that hang: vLLM kills them after five seconds, and does not wait for that."""
    padded_model().save_pretrained(tmp_path)
    before = vllm_processes()
    found = start(tmp_path)
    assert len(vllm_processes() - before) == 2  # its core and one worker
    assert len(sample_all(found)) == 5
    for pid in vllm_processes() - before:
        os.kill(pid, signal.SIGSTOP)
    found.close()
    assert vllm_processes() == before
    found.close()


def test_a_worker_that_is_killed_while_sampling_is_said(tmp_path) -> None:
    """As the kernel does when a pod's memory runs out; an answer that was given stays good."""
    padded_model().save_pretrained(tmp_path)
    before = vllm_processes()
    with closing(start(tmp_path)) as found:
        answers = found.sample(PROMPTS * 16, range(80), max_new_tokens=40, eos_ids=[])
        next(answers)
        for pid in vllm_processes() - before:
            if "Worker" in Path(f"/proc/{pid}/comm").read_text():
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="vLLM's process died while sampling"):
            list(answers)
    assert vllm_processes() == before


def is_vllms(process) -> bool:
    import psutil

    try:
        return process.name().startswith("VLLM")
    except psutil.NoSuchProcess:
        return False


STARTING = """
import sys
from pathlib import Path
from camopd.attempts import heeding_sigterm
from tests.test_vllm_engine import start

if __name__ == "__main__":
    with heeding_sigterm(at_once=True):
        start(Path(sys.argv[1])).close()
"""


def test_sigterm_while_it_starts_leaves_no_process(tmp_path) -> None:
    """As soon as its core is there, and when a worker has been started, too: both long before the engine is ready."""
    import psutil

    padded_model().save_pretrained(tmp_path / "model")
    (tmp_path / "starting.py").write_text(STARTING)
    for wanted in (1, 2):
        starter = subprocess.Popen(
            [sys.executable, str(tmp_path / "starting.py"), str(tmp_path / "model")],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        )
        below: list[psutil.Process] = []
        while sum(map(is_vllms, below)) < wanted:
            assert starter.poll() is None, "it had started before it was stopped"
            below = psutil.Process(starter.pid).children(recursive=True)
            time.sleep(0.02)
        begun = time.monotonic()
        starter.send_signal(signal.SIGTERM)
        assert starter.wait(timeout=15) == 143
        assert time.monotonic() - begun < 10
        _, left = psutil.wait_procs(below, timeout=5)
        assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def test_a_model_with_nan_weights_is_refused_by_name(tmp_path) -> None:
    model = padded_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN"):
        start(tmp_path)


def test_weights_that_vllm_does_not_take_are_one_clear_error(tmp_path) -> None:
    padded_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    with pytest.raises(EngineError, match="vLLM does not start with"):
        start(tmp_path)


# --- Several copies -------------------------------------------------------------------------------------------------------


def test_two_copies_sample_and_score_as_one_does(engine, tmp_path) -> None:
    """To vLLM's precision, since other neighbours share a batch; and every process ends, vLLM's own included."""
    padded_model().save_pretrained(tmp_path)
    before = vllm_processes()
    limits = {"vocab_size": SHARED, "batch_size": 8, "batch_tokens": 24, "max_length": MAX_LENGTH, "vllm": SETTINGS}
    with closing(load_engine("vllm", tmp_path, **limits, replicas=2)) as copies:
        assert len(vllm_processes() - before) == 4
        two, one = (sample_all(found, PROMPTS * 8, range(40), top_k=3) for found in (copies, engine))
        scores = dict(copies.score(PROMPTS * 3, RESPONSES * 3, top_k=3))
    assert vllm_processes() == before
    assert sorted(two) == list(range(40))
    assert sorted(scores) == list(range(15))
    for index, sample in one.items():
        assert two[index].token_ids.tolist() == sample.token_ids.tolist()
        assert two[index].logprobs == pytest.approx(sample.logprobs, abs=1e-4)
        assert two[index].topk_ids.tolist() == sample.topk_ids.tolist()
    for index, score in scores.items():
        exact = exact_logprobs(PROMPTS[index % 5], RESPONSES[index % 5])
        assert score.logprobs == pytest.approx(of_tokens(exact, RESPONSES[index % 5]), abs=1e-4)
        assert score.topk_ids.tolist() == exact.topk(3).indices.tolist()
