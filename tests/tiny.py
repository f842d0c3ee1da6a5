"""Tiny random models for tests: milliseconds to make, the real architecture."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB, EOS = 24, 2


def tiny_model(
    seed: int = 0,
    *,
    vocab_size: int = VOCAB,
    spread: float = 0.6,
    head_dim: int = 8,
    max_length: int = 128,
    tied: bool = True,
) -> Qwen3ForCausalLM:
    """A Qwen3 of 2 layers with peaked enough distributions to be interesting (``spread`` is the weights' deviation)."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        initializer_range=spread,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=1,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config).eval()


def save_tiny(folder: Path, seed: int = 0, **options) -> Path:
    tiny_model(seed, **options).save_pretrained(folder)
    return folder
