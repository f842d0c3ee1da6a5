"""Tiny random models for tests: milliseconds to make, the real architecture."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

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


def save_adapter(folder: Path, model: PreTrainedModel, seed: int = 5, *, rank: int = 3, alpha: float = 4.0, **config) -> Path:
    """A LoRA adapter of every linear layer but the output layer, written by hand in PEFT's format: far from zero."""
    torch.manual_seed(seed)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"}
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features) * 0.3
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank) * 0.3
    targets = sorted({name.rpartition(".")[2] for name in layers})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": targets}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


@torch.no_grad()
def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with W + alpha / r B A in place of each adapted W, by that formula in the model's own precision."""
    settings, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    scaling = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"])
    weights = dict(model.named_parameters())
    for name in {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors}:
        low, high = (tensors[f"base_model.model.{name}.lora_{part}.weight"].to(model.dtype) for part in "AB")
        weights[f"{name}.weight"] += scaling * (high @ low)
    return model
