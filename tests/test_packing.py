"""Packed forward passes against one plain pass a sequence, over architectures; and which models are left padded."""

import json

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
)

from camopd.engines.packing import PACKED, Packing, hidden_states, use_packing
from camopd.engines.transformers import load_model
from tests.tiny import save_tiny, tiny_model

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.5,
}
SEQUENCES = [torch.tensor(ids) for ids in ([3, 4, 5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [9, 9])]


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gpt2() -> PreTrainedModel:
    """Learned positions, no grouped heads."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5))


def windowed() -> PreTrainedModel:
    """A token sees three: rows longer than the window tell a wrong mask."""
    config = MistralConfig(**SIZES, sliding_window=3)
    return MistralForCausalLM(config)


def capped() -> PreTrainedModel:
    """Attention scores are capped, which SDPA cannot do."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES))


def made(make) -> PreTrainedModel:
    torch.manual_seed(0)
    return use_packing(make().eval())


@pytest.mark.parametrize(
    ("make", "packed"),
    [(tiny_model, True), (llama, True), (gpt2, True), (windowed, False), (capped, False)],
)
def test_states_and_gradients_are_those_of_each_sequence_alone(make, packed) -> None:
    model = made(make)
    assert (model.config._attn_implementation == PACKED) == packed
    together = hidden_states(model, torch.cat(SEQUENCES), torch.tensor(list(map(len, SEQUENCES))))
    alone = torch.cat([model.base_model(ids[None], use_cache=False).last_hidden_state[0] for ids in SEQUENCES])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)

    parameters = list(model.base_model.parameters())
    weights = torch.randn(alone.shape)
    ours, theirs = (
        torch.autograd.grad((states * weights).sum(), parameters, allow_unused=True) for states in (together, alone)
    )
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3)


def test_a_model_that_looks_at_its_neighbours_outside_of_attention_is_left_padded() -> None:
    """The probe decides, not a list of names: a convolution would see the end of the sequence before."""
    model = tiny_model()
    model.model.embed_tokens.register_forward_hook(lambda module, ids, states: states + states.roll(1, dims=1))
    assert use_packing(model).config._attn_implementation == "sdpa"


def test_packing_says_where_each_token_stands() -> None:
    packing = Packing.of(torch.tensor([2, 1, 3]))
    assert packing.index_T.tolist() == [0, 1, 3, 6, 7, 8]
    assert (packing.num_rows, packing.width) == (3, 3)


def test_a_checkpoint_knows_nothing_of_it(tmp_path) -> None:
    """Whoever loads the recovered model has transformers' own attention."""
    model = load_model(save_tiny(tmp_path / "a"))
    assert model.config._attn_implementation == PACKED
    model.save_pretrained(tmp_path / "b")
    assert PACKED not in json.dumps(json.loads((tmp_path / "b" / "config.json").read_text()))
    assert Qwen3ForCausalLM.from_pretrained(tmp_path / "b").config._attn_implementation == "sdpa"
