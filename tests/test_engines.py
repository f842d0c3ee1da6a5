"""Sampling and scoring against a plain forward pass in float64, without cache, padding or batching."""

import gc
import weakref
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM, Qwen3ForCausalLM

from camopd.engines import load_engine, token_batches
from camopd.engines.cache import roomy_cache
from camopd.engines.transformers import (
    TransformersEngine,
    draw,
    load_model,
    output_head,
    response_hidden,
    uniforms,
)
from camopd.errors import InputError
from tests.tiny import EOS, VOCAB, save_tiny, tiny_model

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [5, 4], [9, 9, 9, 9]]
SEEDS = [11, 12, 13, 14, 15]
SHARED = VOCAB - 4  # the last four rows of the head are padding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def engine(folder, *, batch_size=5, batch_tokens=64):
    limits = {"vocab_size": SHARED, "batch_size": batch_size, "batch_tokens": batch_tokens, "max_length": 128}
    return load_engine("transformers", folder, **limits)


def exact_logprobs(prompt, response):
    """Log-probabilities (L, SHARED) in float64, one sequence, no padding."""
    model = tiny_model().double()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1, :SHARED]
    return logits.log_softmax(-1)


def sample_all(folder, prompts=PROMPTS, seeds=SEEDS, *, limit=12, eos=(EOS,), top_k=0, **options):
    return dict(engine(folder, **options).sample(prompts, seeds, max_new_tokens=limit, eos_ids=eos, top_k=top_k))


def token_ids(samples):
    return [samples[i].token_ids.tolist() for i in range(len(samples))]


def test_sampled_logprobs_and_entropy_equal_a_plain_forward_pass(folder) -> None:
    for index, sample in sample_all(folder).items():
        exact = exact_logprobs(PROMPTS[index], sample.token_ids)
        own = exact.gather(1, torch.tensor(sample.token_ids, dtype=torch.long)[:, None]).squeeze(1)
        assert sample.logprobs == pytest.approx(own.numpy(), abs=1e-4)
        assert sample.entropy == pytest.approx(-(exact.exp() * exact).sum(-1).mean().item(), abs=1e-4)
        assert (sample.token_ids.dtype, sample.logprobs.dtype) == (np.int32, np.float32)
        assert sample.topk_ids.shape == sample.topk_logprobs.shape == (len(own), 0)


def test_the_samplers_own_top_tokens_equal_a_plain_forward_pass(folder) -> None:
    for index, sample in sample_all(folder, top_k=4).items():
        values, ids = exact_logprobs(PROMPTS[index], sample.token_ids).topk(4)
        assert sample.topk_ids.tolist() == ids.tolist()
        assert sample.topk_logprobs == pytest.approx(values.numpy(), abs=1e-4)


def test_a_response_depends_on_its_prompt_and_seed_alone(folder) -> None:
    together = token_ids(sample_all(folder))
    one_by_one = [sample_all(folder, [PROMPTS[i]], [SEEDS[i]], batch_size=1)[0].token_ids.tolist() for i in range(5)]
    assert together == one_by_one
    assert token_ids(sample_all(folder, seeds=[s + 100 for s in SEEDS])) != together


def test_responses_end_at_an_end_token_or_at_the_limit(folder) -> None:
    ends = (2, 3, 4, 5)
    samples = sample_all(folder, PROMPTS * 8, range(40), limit=6, eos=ends, batch_size=40).values()
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    assert len({len(sample.token_ids) for sample in samples}) == 6  # rows leave the batch at different steps
    for sample in samples:
        assert (sample.token_ids[-1] in ends) == (sample.finish_reason == "stop")
        assert not set(sample.token_ids[:-1].tolist()) & set(ends)
        assert len(sample.token_ids) == 6 or sample.finish_reason == "stop"


def test_padded_ids_of_the_head_are_never_sampled(folder) -> None:
    samples = sample_all(folder, PROMPTS * 20, list(range(100)), limit=20, batch_size=100)
    drawn = set(np.concatenate([sample.token_ids for sample in samples.values()]).tolist())
    assert max(drawn) < SHARED
    assert len(drawn) > SHARED // 2


@pytest.mark.parametrize("batch_tokens", [1, 30, 1000])
def test_scores_equal_a_plain_forward_pass_whatever_the_batching(folder, batch_tokens) -> None:
    responses = [[4, 5, 2], [6, 7, 8, 9, 2], [3], [2], [15, 14, 13, 12]]
    scores = dict(engine(folder, batch_tokens=batch_tokens).score(PROMPTS, responses, top_k=3))
    for index, score in scores.items():
        exact = exact_logprobs(PROMPTS[index], responses[index])
        own = exact.gather(1, torch.tensor(responses[index])[:, None]).squeeze(1)
        assert score.logprobs == pytest.approx(own.numpy(), abs=1e-4)
        values, ids = exact.topk(3, dim=-1)
        assert score.topk_ids.tolist() == ids.tolist()
        assert score.topk_logprobs == pytest.approx(values.numpy(), abs=1e-4)
        assert (score.logprobs.dtype, score.topk_ids.dtype, score.topk_logprobs.dtype) == (np.float32, np.int32, np.float32)


def test_given_ids_are_scored_in_place_of_the_models_own(folder) -> None:
    samples = sample_all(folder, top_k=4)
    responses, ids = [samples[i].token_ids for i in range(5)], [samples[i].topk_ids[:, ::-1] for i in range(5)]
    scores = dict(engine(folder, batch_tokens=20).score(PROMPTS, responses, ids=ids))
    for index, score in scores.items():
        exact = exact_logprobs(PROMPTS[index], responses[index])
        expected = exact.gather(1, torch.tensor(ids[index].copy(), dtype=torch.long))
        assert score.topk_ids.tolist() == ids[index].tolist()
        assert score.topk_logprobs == pytest.approx(expected.numpy(), abs=1e-4)
        assert score.logprobs == pytest.approx(samples[index].logprobs, abs=1e-4)


def test_scoring_what_was_sampled_gives_the_sampled_logprobs(folder) -> None:
    samples = sample_all(folder)
    scores = dict(engine(folder).score(PROMPTS, [samples[i].token_ids for i in range(5)]))
    for index, sample in samples.items():
        assert scores[index].logprobs == pytest.approx(sample.logprobs, abs=1e-4)
        assert scores[index].topk_ids.shape == scores[index].topk_logprobs.shape == (len(sample.token_ids), 0)


def test_layers_with_a_sliding_window_sample_and_score_as_in_a_plain_forward_pass() -> None:
    """One layer that sees three tokens beside one that sees all: the cache keeps two kinds of layer."""
    config = tiny_model().config
    config.layer_types, config.sliding_window = ["sliding_attention", "full_attention"], 3
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    sliding = TransformersEngine(model, vocab_size=SHARED, batch_size=5, batch_tokens=64)
    drawn = dict(sliding.sample(PROMPTS, SEEDS, max_new_tokens=20, eos_ids=[EOS, 3, 4, 5]))
    scores = dict(sliding.score(PROMPTS, [drawn[i].token_ids for i in range(5)]))
    for index, prompt in enumerate(PROMPTS):
        row = torch.tensor([[*prompt, *drawn[index].token_ids.tolist()]])
        logits = model(row, use_cache=False).logits[0, len(prompt) - 1 : -1, :SHARED]
        plain = logits.log_softmax(-1).gather(1, row[0, len(prompt) :, None]).squeeze(1).detach().numpy()
        assert drawn[index].logprobs == pytest.approx(plain, abs=1e-4)
        assert scores[index].logprobs == pytest.approx(plain, abs=1e-4)


def test_the_cache_holds_what_transformers_own_holds() -> None:
    """The same tokens, rows leaving in between, until the room has grown several times."""
    config = tiny_model().config
    ours, theirs = roomy_cache(config), DynamicCache(config=config)
    rows = 4
    for step, count in enumerate([5, *[1] * 40]):
        states = torch.randn(2, rows, config.num_key_value_heads, count, config.head_dim)
        for left, right in zip(ours.update(*states, 1), theirs.update(*states, 1), strict=True):
            assert torch.equal(left, right)
        assert ours.get_seq_length(1) == theirs.get_seq_length(1) == 5 + step
        if step % 15 == 14:
            rows -= 1
            keep = torch.arange(1, rows + 1)
            ours.layers[1].batch_select_indices(keep)
            theirs.layers[1].batch_select_indices(keep)


def test_an_engine_follows_the_weights_of_its_model() -> None:
    model = tiny_model()
    following = TransformersEngine(model, vocab_size=SHARED, batch_size=5, batch_tokens=64)
    before = dict(following.score(PROMPTS[:1], [[4, 5, 2]]))[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    after = dict(following.score(PROMPTS[:1], [[4, 5, 2]]))[0]
    fresh = TransformersEngine(model, vocab_size=SHARED, batch_size=5, batch_tokens=64)
    assert after.logprobs.tolist() == dict(fresh.score(PROMPTS[:1], [[4, 5, 2]]))[0].logprobs.tolist()
    assert after.logprobs != pytest.approx(before.logprobs, abs=1e-3)


def test_response_hidden_is_the_state_before_each_token_with_its_gradient() -> None:
    """Against one unpadded pass a sequence: position P - 1 .. P + L - 2, and the same gradient of their sum of squares."""
    responses = [[4, 5, 2], [6, 7, 8, 9, 2], [3], [2], [15, 14, 13, 12]]
    model = tiny_model()
    together = response_hidden(model, PROMPTS, responses)
    together.square().sum().backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    alone = [
        model.model(torch.tensor([[*prompt, *response]])).last_hidden_state[0, len(prompt) - 1 : -1]
        for prompt, response in zip(PROMPTS, responses, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.cat(alone).square().sum().backward()
    torch.testing.assert_close(gradient, model.model.layers[0].mlp.up_proj.weight.grad)


def test_draw_inverts_the_cumulative_distribution() -> None:
    """With p = (1/2, 0, 1/4, 1/4) a uniform number below 1/2 is token 0, below 3/4 token 2, else token 3, never token 1."""
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(6, 4)
    drawn = draw(logits, torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64), 1)
    assert drawn.tokens_N.tolist() == [0, 0, 2, 2, 3, 3]
    assert drawn.logprobs_N.exp().tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.25, 0.25])
    assert drawn.entropy_N.tolist() == pytest.approx([1.5 * np.log(2)] * 6)
    assert (drawn.topk_ids_NK.tolist(), drawn.topk_logprobs_NK.exp().unique().tolist()) == ([[0]] * 6, [0.5])


def test_draw_tells_rare_tokens_of_a_large_vocabulary_apart() -> None:
    """Tokens of probability 1e-9 behind a nearly certain one: numbers 1e-9 apart draw neighbours, which float32 would merge."""
    logits = torch.full((150_000,), np.log(1e-9))
    logits[0] = 0.0
    probabilities = logits.double().softmax(0)
    wanted = torch.arange(70_000, 70_200)
    drawn = draw(logits.expand(200, -1), probabilities[0] + (wanted.double() - 0.5) * probabilities[1])
    assert drawn.tokens_N.diff().tolist() == [1] * 199
    assert (drawn.tokens_N - wanted).abs().max() < 100  # the first token's probability is rounded to float32


def test_uniform_numbers_are_splitmix64_and_depend_on_seed_and_place_alone() -> None:
    """First numbers of seed 1234567 as published with the reference implementation (Vigna, splitmix64.c)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert uniforms([1234567], 0, 5)[0].tolist() == [(number >> 11) * 2.0**-53 for number in published]
    assert uniforms([5, 1234567], 3, 2)[1].tolist() == [(number >> 11) * 2.0**-53 for number in published[3:]]
    assert uniforms([2**64 - 1], 0, 1) < 1


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


def test_a_model_without_one_of_its_weights_is_refused_by_name(tmp_path) -> None:
    model = tiny_model()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is in none of the files"):
        load_model(tmp_path)


def test_an_architecture_that_caps_its_logits_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=8, final_logit_softcapping=0.1, initializer_range=1.0,
    )  # fmt: skip
    with pytest.raises(InputError, match="changes them after the output layer"):
        output_head(Gemma2ForCausalLM(config).eval())


def test_an_output_layer_with_a_bias_is_refused() -> None:
    config = PhiConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, partial_rotary_factor=1.0
    )
    with pytest.raises(InputError, match="adds a bias"):
        output_head(PhiForCausalLM(config).eval())


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(ValueError, match="'vlm' is not known"):
        load_engine("vlm", None, vocab_size=1, batch_size=1, batch_tokens=1, max_length=1)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_engine_that_is_not_installed_is_said() -> None:
    with pytest.raises(InputError, match="vLLM is not installed here -> run this stage in the inference environment"):
        load_engine("vllm", None, vocab_size=1, batch_size=1, batch_tokens=1, max_length=1)


def test_a_closed_engine_lets_go_of_its_model() -> None:
    held = TransformersEngine(tiny_model(), vocab_size=SHARED, batch_size=5, batch_tokens=64)
    model = weakref.ref(held._model)
    held.close()
    gc.collect()
    assert model() is None
