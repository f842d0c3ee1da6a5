"""Tensors in, (loss, metrics) out: the objectives of method section 2 and the chunked log-probability.

Shape suffixes: T tokens of all responses of a micro-batch laid end to end, N its samples, D hidden width, V shared vocabulary,
K teacher's top tokens. Log-probabilities are in nats. Nothing here knows a file, a branch name or an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # hidden states (T, D) to logits (T, full vocabulary)
TINY = 1e-9  # keeps the logarithm of an empty tail finite


@dataclass(frozen=True)
class TokenLogprobs:
    """What a model says at each position of the responses.

    Attributes:
        sampled_T: log-probability of the sampled token.
        entropy_T: entropy of the distribution, detached.
        chosen_TK: log-probabilities of the K asked-for tokens, or None.
        top_ids_TK: the model's own K most likely tokens (when ``top_k`` was asked for), with ``chosen_TK`` their values.
    """

    sampled_T: Tensor
    entropy_T: Tensor
    chosen_TK: Tensor | None = None
    top_ids_TK: Tensor | None = None


def token_logprobs(
    hidden_TD: Tensor,
    head: Head,
    targets_T: Tensor,
    *,
    vocab_size: int,
    chunk: int,
    ids_TK: Tensor | None = None,
    top_k: int = 0,
) -> TokenLogprobs:
    """Log-probabilities from hidden states, ``chunk`` positions at a time.

    Logits of at most ``chunk`` positions are alive at once, in the forward pass and, by recomputation, in the backward pass:
    never a float32 tensor of all positions by the vocabulary.

    Args:
        hidden_TD: last hidden state at the position *before* each response token.
        head: the output layer.
        targets_T: the sampled token ids.
        vocab_size: ids from here on are padding of the head and get no probability (issue 03's shared vocabulary).
        chunk: positions a piece.
        ids_TK: tokens whose log-probabilities are wanted as well.
        top_k: how many of the model's own most likely tokens are wanted; not together with ``ids_TK``.
    """

    def piece(hidden: Tensor, targets: Tensor, ids: Tensor | None) -> tuple[Tensor, ...]:
        logprobs = head(hidden)[:, :vocab_size].float().log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        sampled = logprobs.gather(1, targets[:, None]).squeeze(1)
        if ids is not None:
            return sampled, entropy, logprobs.gather(1, ids)
        if top_k:
            return sampled, entropy, *logprobs.topk(min(top_k, vocab_size), dim=-1)
        return sampled, entropy

    pieces = []
    for start in range(0, len(targets_T), chunk):
        part = slice(start, start + chunk)
        inputs = (hidden_TD[part], targets_T[part], None if ids_TK is None else ids_TK[part])
        recompute = torch.is_grad_enabled() and hidden_TD.requires_grad
        pieces.append(checkpoint(piece, *inputs, use_reentrant=False) if recompute else piece(*inputs))
    return TokenLogprobs(*(torch.cat(column) for column in zip(*pieces, strict=True)))


@dataclass(frozen=True)
class Terms:
    """One weight a token: everything of the objective that does not depend on the loss's kind.

    Attributes:
        weight_T: r_b / (L_i * number selected): the sequence mean, then the mean over the selected sequences of the step.
        engine_T: log mu(y_t), the rollout engine's log-probability of the sampled token.
        ratio_low: eps_lo.
        ratio_high: eps_hi.
    """

    weight_T: Tensor
    engine_T: Tensor
    ratio_low: float
    ratio_high: float


def token_weights(lengths_N: Tensor, scale_N: Tensor, num_selected: int) -> Tensor:
    """r_b / (L_i * number selected) of each token, laid end to end (T,).

    Args:
        lengths_N: response length of each sample.
        scale_N: factor r_b of each sample's branch.
        num_selected: selected samples of the whole optimiser step, not of this micro-batch.
    """
    return torch.repeat_interleave(scale_N / (lengths_N * num_selected), lengths_N)


def importance_mask(logprobs_T: Tensor, terms: Terms) -> Tensor:
    """w_t = rho_t where eps_lo <= rho_t <= eps_hi, else 0; rho_t = pi_theta / mu. No gradient (method section 2)."""
    ratio = (logprobs_T.detach() - terms.engine_T).exp()
    return torch.where((ratio >= terms.ratio_low) & (ratio <= terms.ratio_high), ratio, 0.0)


def sampled_token_loss(
    logprobs_T: Tensor,
    teacher_T: Tensor,
    terms: Terms,
    *,
    advantage_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sampled-token policy gradient of reverse KL (arXiv:2605.27115, method section 2).

    L = - mean_selected[ (1/L) sum_t w_t r_b A_t log pi_theta(y_t) ] with A_t = log pi_T(y_t) - log pi_theta(y_t), detached.

    Args:
        logprobs_T: the student's log-probability of each sampled token, with gradient.
        teacher_T: the teacher's.
        terms: weights and the engine's log-probabilities.
        advantage_clip: limit on |A_t| (arXiv:2606.30406 clips at 5), none in CaMOPD.

    Returns:
        The micro-batch's part of the step's loss, and per-token sums: ``kept`` tokens with w_t > 0, ``gap`` of |A_t|.
    """
    advantage = teacher_T - logprobs_T.detach()
    gap = advantage.abs().sum()
    if advantage_clip is not None:
        advantage = advantage.clamp(-advantage_clip, advantage_clip)
    w = importance_mask(logprobs_T, terms)
    loss = -(terms.weight_T * w * advantage * logprobs_T).sum()
    return loss, {"kept": (w > 0).sum(), "gap": gap}


def topk_loss(
    logprobs_T: Tensor,
    student_TK: Tensor,
    teacher_TK: Tensor,
    tail_mass_T: Tensor,
    terms: Terms,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reverse KL over the teacher's K most likely tokens and one bucket for the rest (method section 9).

    KL(p || q) = sum_k p_k log(p_k / q_k) + p_tail log(p_tail / q_tail): the exact KL of the coarsened distributions, a lower
    bound of the full one and never renormalised. The expectation over the position's token is exact, so the importance
    weight of that one token does not enter; positions whose own token left [eps_lo, eps_hi] are dropped as in section 2,
    since their rollout no longer looks like the student's.

    Args:
        logprobs_T: the student's log-probability of each sampled token (for the mask).
        student_TK: the student's log-probabilities of the teacher's top tokens, with gradient.
        teacher_TK: the teacher's.
        tail_mass_T: the teacher's probability left over.
        terms: weights and the engine's log-probabilities.

    Returns:
        As ``sampled_token_loss``; ``gap`` sums the KL itself.
    """
    inside = student_TK.exp()
    tail = (1 - inside.sum(-1)).clamp_min(TINY)
    kl = (inside * (student_TK - teacher_TK)).sum(-1) + tail * (tail.log() - tail_mass_T.clamp_min(TINY).log())
    kept = importance_mask(logprobs_T, terms) > 0
    loss = (terms.weight_T * kept * kl).sum()
    return loss, {"kept": kept.sum(), "gap": kl.detach().sum()}
