"""Tensors in, (loss, statistics) out: the objective of method section 2 and the chunked log-probability.

One objective, three teacher signals. At each position there are C candidate tokens: the sampled one, the top k with one
bucket for the rest, or the whole vocabulary. The rule of the preset turns their log-ratios into advantages A, and the loss
descends E[A grad log pi]: over the sampled token with its importance weight (the paper), or over all candidates exactly.

Shape suffixes: T tokens of all responses of a micro-batch laid end to end, N its samples, D hidden width, V vocabulary, K top
tokens, C candidates. Log-probabilities are in nats. Nothing here knows a file, a branch name or an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from camopd.presets import TokenRule, Tokens, log_ratio

TINY = 1e-9  # keeps the logarithm of an empty tail finite
MIB = 2**20


# --- Log-probabilities without gradient -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLogprobs:
    """What a model says at each position of the responses.

    Attributes:
        sampled_T: log-probability of the sampled token.
        chosen_TK: log-probabilities of the K asked-for tokens, or None.
        top_ids_TK: the model's own K most likely tokens (when ``top_k`` was asked for), with ``chosen_TK`` their values.
    """

    sampled_T: Tensor
    chosen_TK: Tensor | None = None
    top_ids_TK: Tensor | None = None


def rows_at_once(vocab_size: int, logits_mib: int) -> int:
    """Positions whose float32 logits take ``logits_mib``."""
    return max(1, logits_mib * MIB // (4 * vocab_size))


@torch.no_grad()
def token_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    vocab_size: int,
    chunk: int,
    ids_TK: Tensor | None = None,
    top_k: int = 0,
) -> TokenLogprobs:
    """Log-probabilities from hidden states, ``chunk`` positions at a time, without gradient.

    Args:
        hidden_TD: last hidden state at the position *before* each response token.
        weight_VD: weight of the output layer.
        targets_T: the sampled token ids.
        vocab_size: ids from here on are padding of the output layer and get no probability.
        chunk: positions whose logits are alive at once.
        ids_TK: tokens whose log-probabilities are wanted as well.
        top_k: how many of the model's own most likely tokens are wanted; not together with ``ids_TK``.
    """

    def piece(part: slice) -> tuple[Tensor, ...]:
        logprobs = logits(hidden_TD[part], weight_VD, vocab_size).log_softmax(-1)
        sampled = logprobs.gather(1, targets_T[part, None]).squeeze(1)
        if ids_TK is not None:
            return sampled, logprobs.gather(1, ids_TK[part])
        if top_k:
            return sampled, *logprobs.topk(min(top_k, vocab_size), dim=-1)
        return (sampled,)

    pieces = [piece(slice(start, start + chunk)) for start in range(0, len(targets_T), chunk)]
    return TokenLogprobs(*(torch.cat(column) for column in zip(*pieces, strict=True)))


def logits(hidden_TD: Tensor, weight_VD: Tensor, vocab_size: int) -> Tensor:
    """float32 logits (T, vocab_size) of the shared vocabulary."""
    return (hidden_TD @ weight_VD[:vocab_size].T).float()


# --- What the loss is given -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """Everything of the objective that depends on neither the signal nor the student.

    Attributes:
        weight_T: r_b / (L_i * number selected): the sequence mean, then the mean over the selected sequences of the step.
        engine_T: log mu(y_t), the rollout engine's log-probability of the sampled token; None where the teacher sampled.
        ratio_low: eps_lo.
        ratio_high: eps_hi.
        rule: advantage of each candidate, from the preset.
        advantage_clip: limit on |A| (arXiv:2606.30406 clips at 5), none in CaMOPD.
    """

    weight_T: Tensor
    engine_T: Tensor | None
    ratio_low: float = 0.5
    ratio_high: float = 2.0
    rule: TokenRule = log_ratio
    advantage_clip: float | None = None


@dataclass(frozen=True)
class Sampled:
    """The teacher's log-probability of each sampled token (T,)."""

    teacher_T: Tensor


@dataclass(frozen=True)
class TopK:
    """The teacher's log-probabilities (T, K) of the tokens ``ids_TK``, its own top k or the student's."""

    ids_TK: Tensor
    teacher_TK: Tensor


@dataclass(frozen=True)
class Full:
    """The teacher's last hidden states (T, D) and the weight of its output layer: its whole distribution, a chunk at a time."""

    hidden_TD: Tensor
    weight_VD: Tensor


Signal = Sampled | TopK | Full


@dataclass(frozen=True)
class Statistics:
    """What the loss saw at each token, without gradient.

    Attributes:
        kept_T: 1 where the importance weight is not zero.
        gap_T: |A| of the sampled token, or the exact divergence over the candidates, nats.
        entropy_T: entropy of the student's distribution, nats.
        drift_T: |log pi_theta - log mu| of the sampled token.
        covered_T: the student's probability of the candidates but the bucket (1 for ``full``).
    """

    kept_T: Tensor
    gap_T: Tensor
    entropy_T: Tensor
    drift_T: Tensor
    covered_T: Tensor


def token_weights(lengths_N: Tensor, scale: float, num_selected: int) -> Tensor:
    """r_b / (L_i * number selected) of each token, laid end to end (T,).

    Args:
        lengths_N: response length of each sample.
        scale: factor r_b of the branch.
        num_selected: selected samples of the whole optimiser step, not of this micro-batch.
    """
    return torch.repeat_interleave(scale / (lengths_N * num_selected), lengths_N)


# --- The objective --------------------------------------------------------------------------------------------------------


def importance_weight(sampled_T: Tensor, terms: Terms) -> Tensor:
    """w_t = rho_t where eps_lo <= rho_t <= eps_hi, else 0; rho_t = pi_theta / mu. No gradient (method section 2)."""
    if terms.engine_T is None:
        return torch.ones_like(sampled_T)
    ratio = (sampled_T.detach() - terms.engine_T).exp()
    return torch.where((ratio >= terms.ratio_low) & (ratio <= terms.ratio_high), ratio, 0.0)


def objective(logprobs_TV: Tensor, targets_T: Tensor, signal: Signal, terms: Terms) -> tuple[Tensor, Statistics]:
    """The micro-batch's part of the step's loss, from the student's whole log-probabilities.

    Sampled token (arXiv:2605.27115, method section 2): L = - sum_t weight_t w_t A_t log pi_theta(y_t), A without gradient.

    Dense (method section 9): L = - sum_t weight_t [w_t > 0] sum_c pi_theta(c) A_c, A without gradient: with the plain
    log-ratio the exact reverse KL of the candidates' distributions, and its gradient. The rest of the vocabulary is one
    candidate, so nothing is renormalised and the value is a lower bound of the full divergence. The expectation over the
    position's token is exact, so the importance weight of that one token does not enter; positions whose own token left
    [eps_lo, eps_hi] are dropped all the same, since their rollout no longer looks like the student's.

    Args:
        logprobs_TV: the student's, over the shared vocabulary, with gradient.
        targets_T: the sampled token ids.
        signal: what the teacher says; for ``Full``, of the same positions.
        terms: weights, limits and the rule.
    """
    sampled_T = logprobs_TV.gather(1, targets_T[:, None]).squeeze(1)
    w_T = importance_weight(sampled_T, terms)
    student_TC, teacher_TC = _candidates(logprobs_TV, sampled_T, signal)
    detached_TC = student_TC.detach()
    advantage_TC = terms.rule(Tokens(detached_TC, teacher_TC))
    if terms.advantage_clip is not None:
        advantage_TC = advantage_TC.clamp(-terms.advantage_clip, terms.advantage_clip)
    log_ratio_TC = detached_TC - teacher_TC
    if isinstance(signal, Sampled):
        value_T = w_T * (advantage_TC * student_TC).squeeze(1)
        gap_T, covered_T = log_ratio_TC.abs().squeeze(1), sampled_T.detach().exp()
    else:
        value_T = (w_T > 0) * (student_TC.exp() * advantage_TC).sum(-1)
        gap_T = (detached_TC.exp() * log_ratio_TC).sum(-1)
        covered_T = torch.ones_like(gap_T) if isinstance(signal, Full) else detached_TC[:, :-1].exp().sum(-1)
    with torch.no_grad():
        entropy_T = -torch.linalg.vecdot(logprobs_TV.exp(), logprobs_TV)
        drift_T = torch.zeros_like(sampled_T) if terms.engine_T is None else (sampled_T - terms.engine_T).abs()
    return -(terms.weight_T * value_T).sum(), Statistics((w_T > 0).float(), gap_T, entropy_T, drift_T, covered_T)


def _candidates(logprobs_TV: Tensor, sampled_T: Tensor, signal: Signal) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T, C) of the candidates under the student, with gradient, and under the teacher."""
    if isinstance(signal, Sampled):
        return sampled_T[:, None], signal.teacher_T[:, None]
    if isinstance(signal, Full):
        with torch.no_grad():
            return logprobs_TV, logits(signal.hidden_TD, signal.weight_VD, logprobs_TV.shape[1]).log_softmax(-1)
    return _with_tail(logprobs_TV.gather(1, signal.ids_TK)), _with_tail(signal.teacher_TK)


def _with_tail(logprobs_TK: Tensor) -> Tensor:
    """Add one candidate for the probability that is left over: (T, K) to (T, K + 1)."""
    tail_T = (1 - logprobs_TK.exp().sum(-1)).clamp_min(TINY).log()
    return torch.cat([logprobs_TK, tail_T[:, None]], -1)


# --- In chunks ------------------------------------------------------------------------------------------------------------


def chunked_objective(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    signal: Signal,
    terms: Terms,
    *,
    vocab_size: int,
    logits_mib: int = 64,
) -> tuple[Tensor, Statistics]:
    """``objective`` from hidden states, with the logits of a few positions alive at once.

    The gradients with respect to hidden states and output layer are made in the forward pass, chunk by chunk, so that no logits
    wait for the backward pass and none are computed twice.

    Args:
        hidden_TD: the student's last hidden state at the position *before* each response token.
        weight_VD: weight of its output layer.
        targets_T: the sampled token ids.
        signal: what the teacher says.
        terms: weights, limits and the rule.
        vocab_size: ids from here on are padding of the output layer and get no probability.
        logits_mib: size of the float32 logits that are alive at once, of student and teacher together; a pass takes five to six
            times as much.
    """
    seen: list[Statistics] = []

    def piece(logits_CV: Tensor, part: slice) -> Tensor:
        loss, statistics = objective(logits_CV.log_softmax(-1), targets_T[part], _part(signal, part), _part(terms, part))
        seen.append(statistics)
        return loss

    distributions = 2 if isinstance(signal, Full) else 1  # the teacher's logits are alive beside the student's
    rows = max(1, rows_at_once(vocab_size, logits_mib) // distributions)
    loss = _Chunked.apply(hidden_TD, weight_VD, piece, vocab_size, rows)
    columns = zip(*(vars(statistics).values() for statistics in seen), strict=True)
    return loss, Statistics(*(torch.cat(column) for column in columns))


def _part(inputs: Any, part: slice) -> Any:
    """The dataclass with every per-position tensor cut to the chunk; weights of output layers stay whole."""
    cut = {
        name: value[part] if isinstance(value, Tensor) and not name.endswith("VD") else value
        for name, value in vars(inputs).items()
    }
    return type(inputs)(**cut)


class _Chunked(torch.autograd.Function):
    """Sum of a scalar function of the logits, one chunk of positions at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        piece: Callable[[Tensor, slice], Tensor],
        vocab_size: int,
        rows: int,
    ) -> Tensor:
        weight = weight_VD[:vocab_size]
        grad_hidden = torch.empty_like(hidden_TD)
        # float32, since hundreds of chunks are added up: in bfloat16 a sum stops growing at 256 times what is added.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_TD), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                logits_CV = logits(hidden_TD[part], weight_VD, vocab_size).detach().requires_grad_()
                value = piece(logits_CV, part)
            (grad,) = torch.autograd.grad(value, logits_CV)
            grad = grad.to(hidden_TD.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None and grad.dtype == torch.float32:
                grad_weight[:vocab_size].addmm_(grad.T, hidden_TD[part])
            elif grad_weight is not None:
                grad_weight[:vocab_size] += grad.T @ hidden_TD[part]
            total += value.detach()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert not torch.is_grad_enabled(), "the gradients are made without a graph: there are no second derivatives"
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: the gradients are as large as the output layer, and nobody else holds them. A second backward pass through
        # the same graph would find them changed, and torch refuses it.
        return grad_hidden.mul_(grads[0]), None if grad_weight is None else grad_weight.mul_(grads[0]), None, None, None
