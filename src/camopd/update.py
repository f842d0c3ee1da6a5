"""One optimiser step on the selected samples, for whoever holds the student: `train` and `recover` (method section 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from camopd.config import Recipe
from camopd.engines.transformers import response_hidden, token_batches
from camopd.errors import UnhealthyRunError
from camopd.losses import Full, Sampled, Statistics, Terms, TopK, chunked_objective, token_weights
from camopd.presets import presets
from camopd.student import Student, learning, whole

Row = Mapping[str, Any]


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    train = recipe.train
    return torch.optim.AdamW(
        learning(model).values(),
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
    student: Student,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    *,
    recipe: Recipe,
    vocab_size: int,
    teacher_weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """One optimiser step on the selected samples of one step; the parameters change only when everything is finite.

    Processes that share the student share the samples: loss, gradient and numbers are those of all samples, on each of them.

    Args:
        student: the model and how it computes.
        optimizer: of its parameters.
        rows: the step's selected samples, of one branch or of several; all of them on every process.
        recipe: objective and limits.
        vocab_size: shared token ids.
        teacher_weights: of the teachers' output layers by branch, for the full signal.

    Returns:
        loss, grad_norm (before clipping), means over the selected tokens: kept_ratio (share with w_t > 0), entropy, engine_gap
        (|log p_engine - log p_trainer|); and ``branches`` with gap, kept_ratio and topk_mass of each.

    Raises:
        UnhealthyRunError: the loss or the gradient is not finite, on any process.
    """
    optimizer.zero_grad(set_to_none=True)
    shortest = min(rows, key=num_tokens)
    loss_sum = torch.zeros(1, dtype=torch.float64, device=student.model.device)
    sums = {name: loss_sum.new_zeros(1 + len(COLUMNS)) for name in sorted({row["branch"] for row in rows})}
    for batch in shares(micro_batches(rows, recipe.train.batch_tokens), student.num_ranks)[student.rank]:

        def loss_of(model: PreTrainedModel, batch: Sequence[Row] = batch) -> tuple[Tensor, Statistics]:
            present = batch or [shortest]
            loss, statistics = rows_loss(
                model,
                present,
                recipe=recipe,
                vocab_size=vocab_size,
                num_selected=len(rows),
                teacher_weight=(teacher_weights or {}).get(present[0]["branch"]),
            )
            return (loss if batch else 0 * loss), statistics

        loss, statistics = student.backward(loss_of)
        if batch:
            loss_sum += loss
            sums[batch[0]["branch"]] += token_sums(statistics)
    numbers = student.total(torch.cat([loss_sum, *sums.values()])).tolist()
    total, columns = numbers[0], np.reshape(numbers[1:], (len(sums), -1))
    norm = whole(torch.nn.utils.clip_grad_norm_(student.model.parameters(), recipe.train.max_grad_norm)).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise UnhealthyRunError(
            f"loss {total} or gradient norm {norm} is not finite; lower train.learning_rate or look at the teachers' scores"
        )
    optimizer.step()
    return {"loss": total, "grad_norm": norm, **token_means(dict(zip(sums, columns, strict=True)))}


# --- Micro-batches --------------------------------------------------------------------------------------------------------


def num_tokens(row: Row) -> int:
    return len(row["prompt_ids"]) + len(row["response_ids"])


def micro_batches(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """The rows in passes of one branch each, with members times longest member within ``budget`` tokens."""
    batches = []
    for _, own in groupby(sorted(rows, key=itemgetter("branch")), key=itemgetter("branch")):
        part = list(own)
        batches += [[part[i] for i in batch] for batch in token_batches([num_tokens(row) for row in part], budget)]
    return batches


def shares(batches: Sequence[list[Row]], num_ranks: int) -> list[list[list[Row]]]:
    """The passes of each process: as many for each, since every pass of a spread model is one of all processes, and those of
    one turn alike in size, since the others wait for the longest.

    The largest are halved until their number divides. Where there are too few samples for that, some passes are empty.
    """
    if num_ranks == 1:
        return [list(batches)]

    def size(batch: list[Row]) -> int:
        return len(batch) * max(map(num_tokens, batch), default=0)

    parts = list(batches)
    while len(parts) % num_ranks:
        parts.sort(key=lambda batch: (len(batch) > 1, size(batch)))
        largest = parts.pop()
        middle = len(largest) // 2  # 0 for a single sample, whose first half is then an empty pass
        parts += [largest[:middle], largest[middle:]]
    parts.sort(key=size)
    return [parts[rank::num_ranks] for rank in range(num_ranks)]


# --- Numbers of a step ----------------------------------------------------------------------------------------------------

COLUMNS = ("kept_T", "entropy_T", "drift_T", "gap_T", "covered_T")  # of Statistics, in the order of the sums


def token_sums(statistics: Statistics) -> Tensor:
    """How many tokens there are and the sum of each column over them (1 + 5,), float64."""
    columns = torch.stack([getattr(statistics, name) for name in COLUMNS]).double()
    return torch.cat([columns.new_full((1,), columns.shape[1]), columns.sum(1)])


def token_means(sums: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Means over the step's tokens, and by branch, from each branch's ``token_sums``."""
    of_all = {"kept_ratio": "kept_T", "entropy": "entropy_T", "engine_gap": "drift_T"}
    of_branch = {"gap": "gap_T", "kept_ratio": "kept_T", "topk_mass": "covered_T"}

    def means(own: NDArray[np.float64], names: Mapping[str, str]) -> dict[str, float]:
        by_column = dict(zip(COLUMNS, (own[1:] / own[0]).tolist(), strict=True))
        return {name: by_column[column] for name, column in names.items()}

    everything = means(np.sum(list(sums.values()), axis=0), of_all)
    return everything | {"branches": {branch: means(own, of_branch) for branch, own in sums.items()}}


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
