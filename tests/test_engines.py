"""Sampling and scoring against a plain forward pass in float64, without cache, padding or batching."""

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from camopd.engines import load_engine
from camopd.engines.transformers import draw, load_model, output_head, token_batches
from camopd.errors import InputError
from tests.tiny import EOS, VOCAB, save_tiny, tiny_model

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [5, 4], [9, 9, 9, 9]]
SEEDS = [11, 12, 13, 14, 15]
SHARED = VOCAB - 4  # the last four rows of the head are padding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def engine(folder, *, batch_size=5, batch_tokens=64):
    return load_engine("transformers", folder, vocab_size=SHARED, batch_size=batch_size, batch_tokens=batch_tokens)


def exact_logprobs(prompt, response):
    """Log-probabilities (L, SHARED) in float64, one sequence, no padding."""
    model = tiny_model().double()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1, :SHARED]
    return logits.log_softmax(-1)


def sample_all(folder, prompts=PROMPTS, seeds=SEEDS, *, limit=12, eos=(EOS,), **options):
    return dict(engine(folder, **options).sample(prompts, seeds, max_new_tokens=limit, eos_ids=eos))


def test_sampled_logprobs_and_entropy_equal_a_plain_forward_pass(folder) -> None:
    for index, sample in sample_all(folder).items():
        exact = exact_logprobs(PROMPTS[index], sample.token_ids)
        own = exact.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)
        assert sample.logprobs == pytest.approx(own.tolist(), abs=1e-4)
        assert sample.entropy == pytest.approx(-(exact.exp() * exact).sum(-1).mean().item(), abs=1e-4)


def test_a_response_depends_on_its_prompt_and_seed_alone(folder) -> None:
    together = sample_all(folder)
    one_by_one = {i: sample_all(folder, [PROMPTS[i]], [SEEDS[i]], batch_size=1)[0] for i in range(5)}
    assert {i: s.token_ids for i, s in together.items()} == {i: s.token_ids for i, s in one_by_one.items()}
    assert sample_all(folder, seeds=[s + 100 for s in SEEDS]) != together


def test_responses_end_at_an_end_token_or_at_the_limit(folder) -> None:
    ends = (2, 3, 4, 5)
    samples = sample_all(folder, limit=6, eos=ends).values()
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert (sample.token_ids[-1] in ends) == (sample.finish_reason == "stop")
        assert not set(sample.token_ids[:-1]) & set(ends)
        assert len(sample.token_ids) == 6 or sample.finish_reason == "stop"


def test_padded_ids_of_the_head_are_never_sampled(folder) -> None:
    samples = sample_all(folder, PROMPTS * 20, list(range(100)), limit=20, batch_size=100)
    drawn = {token for sample in samples.values() for token in sample.token_ids}
    assert max(drawn) < SHARED
    assert len(drawn) > SHARED // 2


@pytest.mark.parametrize("batch_tokens", [1, 30, 1000])
def test_scores_equal_a_plain_forward_pass_whatever_the_batching(folder, batch_tokens) -> None:
    responses = [[4, 5, 2], [6, 7, 8, 9, 2], [3], [2], [15, 14, 13, 12]]
    scores = dict(engine(folder, batch_tokens=batch_tokens).score(PROMPTS, responses, top_k=3))
    for index, score in scores.items():
        exact = exact_logprobs(PROMPTS[index], responses[index])
        assert score.logprobs == pytest.approx(
            exact.gather(1, torch.tensor(responses[index])[:, None]).squeeze(1).tolist(), abs=1e-4
        )
        values, ids = exact.topk(3, dim=-1)
        assert score.topk_ids == ids.tolist()
        torch.testing.assert_close(torch.tensor(score.topk_logprobs, dtype=torch.float64), values, atol=1e-4, rtol=0)
        assert score.tail_mass == pytest.approx((1 - values.exp().sum(-1)).tolist(), abs=1e-4)


def test_scoring_what_was_sampled_gives_the_sampled_logprobs(folder) -> None:
    samples = sample_all(folder)
    scores = dict(engine(folder).score(PROMPTS, [samples[i].token_ids for i in range(5)]))
    for index, sample in samples.items():
        assert scores[index].logprobs == pytest.approx(sample.logprobs, abs=1e-4)
        assert scores[index].topk_ids == []


def test_draw_inverts_the_cumulative_distribution() -> None:
    """With p = (1/2, 0, 1/4, 1/4) a uniform number below 1/2 is token 0, below 3/4 token 2, else token 3, never token 1."""
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(6, 4)
    tokens, logprobs, entropy = draw(logits, np.array([0.0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53]))
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    assert logprobs.exp().tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.25, 0.25])
    assert entropy.tolist() == pytest.approx([1.5 * np.log(2)] * 6)


def test_token_batches_hold_everything_once_within_the_budget() -> None:
    lengths = [5, 1, 9, 3, 3, 20]
    batches = list(token_batches(lengths, 12))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len(b) * max(lengths[i] for i in b) <= 12 for b in batches[:-1])
    assert batches[-1] == [5]  # longer than the budget: alone


def test_a_model_with_nan_weights_is_refused_by_name(tmp_path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load_model(tmp_path)


def test_an_architecture_that_caps_its_logits_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=8, final_logit_softcapping=0.1, initializer_range=1.0,
    )  # fmt: skip
    with pytest.raises(InputError, match="changes its logits"):
        output_head(Gemma2ForCausalLM(config).eval())


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(ValueError, match="'vlm' is not known"):
        load_engine("vlm", None, vocab_size=1, batch_size=1, batch_tokens=1)
