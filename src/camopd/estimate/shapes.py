"""A model's numbers from its config.json alone: parameters, operations a token, bytes of cache and of activations.

Symbols: D hidden width, I intermediate width, N layers, Q = query heads x head width, K = key-value heads x head width, V
vocabulary, w bytes of a number in the computation's type. FLOPs count a multiplication and an addition as two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from camopd.adapters import RANK
from camopd.errors import InputError, Problem
from camopd.recipe.sections import Lora

# Dense decoders with a gated MLP (transformers 5.24, modeling_<type>.py). qwen2 has biases on queries, keys and values whatever
# its configuration says; the others have them, and one on the attention's output, with ``attention_bias``.
_KINDS = ("llama", "mistral", "qwen2", "qwen3")
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder: grouped-query attention, gated MLP, RMS norms.

    Attributes:
        model_type: architecture, as in config.json.
        vocab_size: V, rows of the embedding and of the output layer.
        hidden: D.
        intermediate: I.
        layers: N.
        heads: query heads.
        kv_heads: key-value heads.
        head_width: of one head.
        tied: whether the output layer is the embedding.
        qk_norm: RMS norms on queries and keys.
        qkv_bias: biases on queries, keys and values.
        out_bias: a bias on the attention's output.
        mlp_bias: biases in the MLP.
    """

    model_type: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    tied: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    @property
    def query(self) -> int:
        """Q."""
        return self.heads * self.head_width

    @property
    def key(self) -> int:
        """K."""
        return self.kv_heads * self.head_width

    # --- Parameters -------------------------------------------------------------------------------------------------------

    @property
    def block_matrix(self) -> int:
        """Parameters of a layer that every token is multiplied with: D (Q + 2 K) + Q D + 3 D I."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @property
    def block(self) -> int:
        """Parameters of a layer: its matrices, two norms of D, norms of a head's width on queries and keys, and biases."""
        norms = 2 * self.hidden + 2 * self.head_width * self.qk_norm
        biases = (self.query + 2 * self.key) * self.qkv_bias + self.hidden * self.out_bias
        return self.block_matrix + norms + biases + (2 * self.intermediate + self.hidden) * self.mlp_bias

    @property
    def head(self) -> int:
        """Parameters of the output layer, V D, whether it is a tensor of its own or not."""
        return self.vocab_size * self.hidden

    @property
    def parameters(self) -> int:
        """All: N layers, embedding, final norm, and the output layer where it is not the embedding."""
        return self.layers * self.block + self.hidden + self.head * (1 if self.tied else 2)

    @property
    def outside(self) -> int:
        """Parameters that belong to no layer."""
        return self.parameters - self.layers * self.block

    def adapter(self, lora: Lora | None) -> int:
        """Parameters of a LoRA adapter: rank (in + out) of each layer's matrix that has one. A part of the layers counts as
        all, and where the recipe names no rank, ``adapters.RANK`` stands for the given adapter's."""
        if lora is None:
            return 0
        wide, mlp = self.hidden + self.query, self.hidden + self.intermediate
        sizes = {"q_proj": wide, "o_proj": wide, "gate_proj": mlp, "up_proj": mlp, "down_proj": mlp}
        sizes |= dict.fromkeys(("k_proj", "v_proj"), self.hidden + self.key)
        chosen = {target.rpartition(".")[2] for target in lora.targets or sizes}
        return (lora.rank or RANK) * self.layers * sum(size for name, size in sizes.items() if name in chosen)

    # --- Operations -------------------------------------------------------------------------------------------------------

    @property
    def token_flops(self) -> int:
        """Of a token's forward pass through all matrices but the output layer: 2 N D (2 Q + 2 K + 3 I)."""
        return 2 * self.layers * self.block_matrix

    @property
    def pair_flops(self) -> int:
        """Of attention for a token and one it sees, itself included: q.k and a.v, 4 N Q. Softmax and norms are left out."""
        return 4 * self.layers * self.query

    @property
    def head_flops(self) -> int:
        """Of the logits of one position: 2 V D."""
        return 2 * self.head

    # --- Memory -----------------------------------------------------------------------------------------------------------

    def cache_bytes(self, width: int) -> int:
        """Key-value cache of one token: 2 N K w."""
        return 2 * self.layers * self.key * width

    def saved_bytes(self, width: int) -> int:
        """What one layer keeps of one token for its backward pass, with SDPA and no checkpointing, in the order it is made.

        Two norms: input in float32, normalised, output. Norms of queries and keys: the same without the output. Queries, keys
        and values twice: end to end, and in the rectangle that attention gets (``engines.packing``). Attention's output in
        either form and its log-sum-exp. The MLP: gate, its activation, up, product. The norms' reciprocals.
        """
        norms = 2 * (FLOAT32 + 2 * width) * self.hidden + 2 * FLOAT32
        qk_norms = ((FLOAT32 + width) * (self.query + self.key) + FLOAT32 * (self.heads + self.kv_heads)) * self.qk_norm
        attention = 2 * width * (self.query + 2 * self.key) + 2 * width * self.query + FLOAT32 * self.heads
        return norms + qk_norms + attention + 4 * width * self.intermediate

    def outer_bytes(self, width: int) -> int:
        """What is kept of one token outside the layers: the final norm, rotary angles, token id and its place."""
        return (FLOAT32 + width) * self.hidden + FLOAT32 + 2 * width * self.head_width + 16

    def passing_bytes(self, width: int) -> int:
        """What one token needs while a layer computes: residual, its norm in float32, gate, its activation and up."""
        return (2 * width + 2 * FLOAT32) * self.hidden + 3 * width * self.intermediate


def causal_pairs(length: float) -> float:
    """Pairs of a token and one it sees in a sequence: S (S + 1) / 2. Kernels skip the other half."""
    return length * (length + 1) / 2


def read_shape(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape that a config.json describes.

    Args:
        config: its content.
        where: the file, for messages.

    Raises:
        InputError: another kind of model, or a number that is missing or not positive.
    """
    kind = config.get("model_type")
    if kind not in _KINDS:
        what = f"model_type {kind!r} is none of {', '.join(_KINDS)}"
        raise InputError([Problem(where, what, "estimates are for dense decoders with a gated MLP; measure this one")])
    wrong = [key for key in _NEEDED if not isinstance(config.get(key), int) or config[key] < 1]
    if wrong:
        raise InputError([Problem(where, f"{key} is {config.get(key)!r}", "give the model's own config.json") for key in wrong])
    biased = bool(config.get("attention_bias", False))
    heads = config["num_attention_heads"]
    return ModelShape(
        model_type=kind,
        vocab_size=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or config["hidden_size"] // heads,
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=kind == "qwen3",
        qkv_bias=biased or kind == "qwen2",
        out_bias=biased and kind != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
