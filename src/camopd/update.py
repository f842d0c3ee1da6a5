"""One optimiser step on the selected samples, for whoever holds the student: `train` and `recover` (method section 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from camopd.config import Recipe
from camopd.engines.transformers import response_hidden, token_batches
from camopd.errors import UnhealthyRunError
from camopd.losses import Full, Sampled, Statistics, Terms, TopK, chunked_objective, token_weights
from camopd.presets import presets

Row = Mapping[str, Any]


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    train = recipe.train
    return torch.optim.AdamW(
        model.parameters(),
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        weight_decay=train.weight_decay,
        fused=True,
    )


def rows_loss(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    recipe: Recipe,
    vocab_size: int,
    num_selected: int,
    teacher_weight: Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """The part of the step's loss that some samples of one branch make up, and what it saw at each token.

    Args:
        model: the student, in evaluation mode (a dropout would make the ratio to the engine meaningless).
        rows: samples of one branch with prompt_ids, response_ids, logprobs (the engine's) and what the signal needs.
        recipe: objective and limits.
        vocab_size: shared token ids.
        num_selected: selected samples of the whole step.
        teacher_weight: of the output layer of the branch's teacher (V, D), for the full signal.
    """
    prompts, responses = [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows]

    def flat(column: str, kind: type = np.float32) -> Tensor:
        return torch.from_numpy(np.concatenate([row[column] for row in rows]).astype(kind)).to(model.device)

    branch, train = recipe.branch(rows[0]["branch"]), recipe.train
    lengths = torch.tensor([len(response) for response in responses], device=model.device)
    terms = Terms(
        weight_T=token_weights(lengths, branch.scale, num_selected),
        engine_T=None if recipe.rollout.sampler == "teacher" else flat("logprobs"),
        ratio_low=train.ratio_low,
        ratio_high=train.ratio_high,
        rule=presets()[recipe.method].rule,
        advantage_clip=train.advantage_clip,
    )
    return chunked_objective(
        response_hidden(model, prompts, responses),
        model.get_output_embeddings().weight,
        flat("response_ids", np.int64),
        _signal(rows, recipe, flat, teacher_weight),
        terms,
        vocab_size=vocab_size,
        logits_mib=train.logits_mib,
    )


def _signal(
    rows: Sequence[Row], recipe: Recipe, flat: Callable[..., Tensor], teacher_weight: Tensor | None
) -> Sampled | TopK | Full:
    """What the teacher says about the samples."""
    if recipe.score.signal == "sampled":
        return Sampled(flat("teacher_logprobs"))
    if recipe.score.signal == "topk":
        return TopK(flat("topk_ids", np.int64), flat("topk_logprobs"))
    assert teacher_weight is not None, "the full signal needs the teacher in this process"
    return Full(torch.cat([row["teacher_hidden"] for row in rows]), teacher_weight)


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    *,
    recipe: Recipe,
    vocab_size: int,
    teacher_weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """One optimiser step on the selected samples of one step; the parameters change only when everything is finite.

    Args:
        model: the student.
        optimizer: of its parameters.
        rows: the step's selected samples, of one branch or of several.
        recipe: objective and limits.
        vocab_size: shared token ids.
        teacher_weights: of the teachers' output layers by branch, for the full signal.

    Returns:
        loss, grad_norm (before clipping), means over the selected tokens: kept_ratio (share with w_t > 0), entropy, engine_gap
        (|log p_engine - log p_trainer|); and ``branches`` with gap, kept_ratio, topk_mass and tokens of each.

    Raises:
        UnhealthyRunError: the loss or the gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    seen: dict[str, list[Statistics]] = {}
    for name, own in groupby(sorted(rows, key=itemgetter("branch")), key=itemgetter("branch")):
        part = list(own)
        lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in part]
        for batch in token_batches(lengths, recipe.train.batch_tokens):
            loss, statistics = rows_loss(
                model,
                [part[i] for i in batch],
                recipe=recipe,
                vocab_size=vocab_size,
                num_selected=len(rows),
                teacher_weight=(teacher_weights or {}).get(name),
            )
            loss.backward()
            total += loss.item()
            seen.setdefault(name, []).append(statistics)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise UnhealthyRunError(
            f"loss {total} or gradient norm {norm} is not finite; lower train.learning_rate or look at the teachers' scores"
        )
    optimizer.step()
    return {"loss": total, "grad_norm": norm, **token_means(seen)}


def token_means(seen: Mapping[str, Sequence[Statistics]]) -> dict[str, Any]:
    """Means over the step's tokens, and by branch."""

    def mean(parts: Sequence[Statistics], column: str) -> float:
        return torch.cat([getattr(part, column) for part in parts]).mean().item()

    everything = [part for parts in seen.values() for part in parts]
    whole = {"kept_ratio": "kept_T", "entropy": "entropy_T", "engine_gap": "drift_T"}
    own = {"gap": "gap_T", "kept_ratio": "kept_T", "topk_mass": "covered_T"}
    return {name: mean(everything, column) for name, column in whole.items()} | {
        "branches": {branch: {name: mean(parts, column) for name, column in own.items()} for branch, parts in seen.items()}
    }


def batch_numbers(batch: Sequence[Row], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Counts of one step by branch: sampled and selected samples, tokens trained on and the branch's share of them, mean
    length and share cut of what was sampled."""
    tokens = sum(len(row["response_ids"]) for row in rows)
    numbers = {}
    for name in dict.fromkeys(row["branch"] for row in batch):
        sampled, trained = ([row for row in part if row["branch"] == name] for part in (batch, rows))
        own = sum(len(row["response_ids"]) for row in trained)
        numbers[name] = {
            "num_samples": len(sampled),
            "num_selected": len(trained),
            "tokens": own,
            "token_share": own / tokens,
            "mean_length": sum(len(row["response_ids"]) for row in sampled) / len(sampled),
            "cut_share": sum(row["finish_reason"] == "length" for row in sampled) / len(sampled),
        }
    return numbers
