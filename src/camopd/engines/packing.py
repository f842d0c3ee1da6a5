"""Forward passes without padding: the sequences of a batch laid end to end, padded only where attention needs a rectangle.

Everything of a transformer but attention looks at one token at a time, so padding is work for nothing there. Attention still
gets its (N, S) rectangle, and with it the fast causal kernels, on any device.

Shape suffixes: N sequences, S positions of the longest, T tokens of all, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed_sdpa"


@dataclass(frozen=True)
class Packing:
    """Where each token of sequences laid end to end stands among (num_rows, width) positions padded on the right.

    Attributes:
        index_T: row * width + position.
        num_rows: N.
        width: S.
    """

    index_T: Tensor
    num_rows: int
    width: int

    @classmethod
    def of(cls, lengths_N: Tensor) -> Packing:
        num_rows, width = len(lengths_N), int(lengths_N.max())
        real_NS = torch.arange(width, device=lengths_N.device) < lengths_N[:, None]
        return cls(real_NS.flatten().nonzero().squeeze(1), num_rows, width)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; on (1, heads, T, width of a head) with ``packing`` each sequence sees itself alone.

    Padding comes after the tokens, attention is causal, and what padding attends to is thrown away: no mask is needed, and no
    gradient comes from there.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def padded(states: Tensor) -> Tensor:
        flat = states[0].transpose(0, 1).flatten(1)
        rows = flat.new_zeros(packing.num_rows * packing.width, flat.shape[1]).index_copy(0, packing.index_T, flat)
        return rows.view(packing.num_rows, packing.width, -1, states.shape[-1]).transpose(1, 2)

    found, _ = sdpa_attention_forward(module, padded(query), padded(key), padded(value), None, **options)
    return found.flatten(0, 1).index_select(0, packing.index_T)[None], None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def packed_states(model: PreTrainedModel, tokens_T: Tensor, packing: Packing) -> Tensor:
    """``hidden_states`` of a model that ``use_packing`` accepted."""
    out = model.base_model(
        input_ids=tokens_T[None],
        position_ids=(packing.index_T % packing.width)[None],
        attention_mask=torch.empty(1, 1, 1, 1, device=tokens_T.device),  # a ready-made mask is left alone, and none is built
        packing=packing,
        use_cache=False,
    )
    return out.last_hidden_state[0]


def padded_states(model: PreTrainedModel, tokens_T: Tensor, packing: Packing) -> Tensor:
    """``hidden_states`` of any causal model, from rows padded on the right: no token sees the padding that comes after it."""
    rows = tokens_T.new_zeros(packing.num_rows * packing.width).index_copy(0, packing.index_T, tokens_T)
    states = model.base_model(input_ids=rows.view(packing.num_rows, packing.width), use_cache=False).last_hidden_state
    return states.flatten(0, 1).index_select(0, packing.index_T)


def hidden_states(model: PreTrainedModel, tokens_T: Tensor, lengths_N: Tensor) -> Tensor:
    """Last hidden states (T, D) of sequences laid end to end, with gradient where it is enabled.

    Args:
        model: a causal model.
        tokens_T: token ids of all sequences.
        lengths_N: length of each.
    """
    states = packed_states if model.config._attn_implementation == PACKED else padded_states
    return states(model, tokens_T, Packing.of(lengths_N))


@torch.no_grad()
def use_packing(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``hidden_states`` do without padding where that is the same: full attention in every layer, by SDPA."""
    config = model.config
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or layers != {"full_attention"} or getattr(config, "sliding_window", None):
        return model
    lengths = torch.tensor([5, 2, 7], device=model.device)
    probe = torch.arange(14, device=model.device) % config.vocab_size, Packing.of(lengths)
    expected = padded_states(model, *probe)
    model.set_attn_implementation(PACKED)
    if config._attn_implementation == PACKED and not torch.allclose(packed_states(model, *probe), expected, atol=1e-3):
        model.set_attn_implementation("sdpa")
    return model
