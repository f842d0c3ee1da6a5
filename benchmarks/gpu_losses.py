"""The loss of one response by several hands on one device: ours in chunks, with all logits at once, and TRL's kernels.

The same inputs, the same value: hidden states and output layer in bfloat16, forward and backward pass with gradients for both.
`sampled`: the importance-weighted log-ratio of the sampled token, and the entropy that is logged. `full`: the reverse
KL over the whole vocabulary. TRL 1.16.0 has `ChunkedLogProbFunction` for the one and `ChunkedDivergenceFunction` for the other,
with Triton on a GPU; the sum over its tokens is ours, in the same few lines for all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from camopd.losses import Full, Sampled, Terms, chunked_objective, importance_weight, logits, objective

OURS, WHOLE, TRL = "camopd, in chunks", "all logits at once", "TRL"
SIGNALS = ("sampled", "full")
MIB = 2**20


@dataclass(frozen=True)
class Inputs:
    """Of one response of T tokens, on the device."""

    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor
    teacher: Sampled | Full
    terms: Terms

    @property
    def vocab_size(self) -> int:
        return self.weight_VD.shape[0]


def make_inputs(tokens: int, width: int, vocab_size: int, signal: str, *, seed: int, where: torch.device) -> Inputs:
    """Random inputs; the engine agrees with the student but for a tenth of a nat, so that every token counts."""
    torch.manual_seed(seed)

    def random(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, device=where).mul_(scale).bfloat16()

    hidden_TD, weight_VD = random(tokens, width, scale=1.0), random(vocab_size, width, scale=1.5 / width**0.5)
    targets_T = torch.randint(vocab_size, (tokens,), device=where)
    with torch.no_grad():
        own_T = torch.cat(
            [
                logits(hidden, weight_VD, vocab_size).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
                for hidden, target in zip(hidden_TD.split(256), targets_T.split(256), strict=True)
            ]
        )
    noise_T = torch.randn_like(own_T)
    teacher = (
        Sampled(own_T + noise_T)
        if signal == "sampled"
        else Full(random(tokens, width, scale=1.0), random(vocab_size, width, scale=1.5 / width**0.5))
    )
    terms = Terms(torch.full_like(own_T, 1 / tokens), own_T + 0.1 * noise_T)
    return Inputs(hidden_TD.requires_grad_(), weight_VD.requires_grad_(), targets_T, teacher, terms)


# --- The hands --------------------------------------------------------------------------------------------------------------


def in_chunks(given: Inputs, logits_mib: int) -> Tensor:
    at = given.hidden_TD, given.weight_VD, given.targets_T, given.teacher, given.terms
    return chunked_objective(*at, vocab_size=given.vocab_size, logits_mib=logits_mib)[0]


def all_at_once(given: Inputs) -> Tensor:
    """The same objective from the log-softmax of all logits, as a loss is written first."""
    logprobs_TV = logits(given.hidden_TD, given.weight_VD, given.vocab_size).log_softmax(-1)
    return objective(logprobs_TV, given.targets_T, given.teacher, given.terms)[0]


def by_trl(given: Inputs) -> Tensor:
    """TRL's kernels in place of the log-softmax, with the tile sizes of its trainers."""
    terms = given.terms
    if isinstance(given.teacher, Sampled):
        kernel = importlib.import_module("trl.kernels").ChunkedLogProbFunction
        tile = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
        at = given.hidden_TD, given.weight_VD, None, given.targets_T
        sampled_T = kernel.apply(*at, 1.0, tile, None, 1.0, ("entropy",))[0]
        advantage_T = given.teacher.teacher_T - sampled_T.detach()
        return -(terms.weight_T * importance_weight(sampled_T, terms) * advantage_T * sampled_T).sum()
    kernel = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    teacher = given.teacher
    divergence_T, _ = kernel.apply(
        given.hidden_TD, given.weight_VD, None, teacher.hidden_TD, teacher.weight_VD, None, 1.0, 1.0, 1.0, None, 1.0, None
    )
    return (terms.weight_T * divergence_T).sum()


def hands(logits_mib: Mapping[str, int]) -> dict[str, Callable[[Inputs], Tensor]]:
    """Who can compute the loss here, by name; ours once for each named size of the tile. TRL where it can be imported."""
    found: dict[str, Callable[[Inputs], Tensor]] = {
        f"{OURS} of {mib} MiB{note}": partial(in_chunks, logits_mib=mib) for note, mib in logits_mib.items()
    }
    found[WHOLE] = all_at_once
    return found | ({TRL: by_trl} if trl_version() else {})


def trl_version() -> str | None:
    """TRL's version, None where it is not installed."""
    try:
        importlib.import_module("trl.kernels.chunked_divergence")
    except ImportError:
        return None
    return str(importlib.import_module("trl").__version__)


def expected_bytes(name: str, given: Inputs, logits_mib: Mapping[str, int]) -> float:
    """Roughly what a hand needs beyond its inputs, so that it is not asked where it cannot be held: float32 logits, their
    log-softmax and its gradient of student and teacher for all at once; both gradients in float32 for everyone."""
    distributions = 2 if isinstance(given.teacher, Full) else 1
    gradients = 6 * (given.hidden_TD.numel() + given.weight_VD.numel())
    if name == WHOLE:
        return 4 * 4 * distributions * len(given.targets_T) * given.vocab_size + gradients
    return 6 * max(logits_mib.values()) * MIB + gradients + 2 * 4 * 4096 * 32768
