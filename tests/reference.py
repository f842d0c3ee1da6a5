"""The method as it is printed: float64, one token at a time, nothing of camopd's called. What the trainer is compared with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.tiny import VOCAB, tiny_model

SHARED = VOCAB - 4  # the last rows of the tiny models' output layer belong to no token
K = 3
Row = dict[str, Any]
Advantage = Callable[[float, float], float]  # of the probabilities under teacher and student


def exact(model, row: Row) -> Tensor:
    """The model's probabilities (L, SHARED) at each response position of one row, without padding."""
    ids = torch.tensor([[*row["prompt_ids"].tolist(), *row["response_ids"].tolist()]])
    return model(ids, use_cache=False).logits[0, len(row["prompt_ids"]) - 1 : -1, :SHARED].double().softmax(-1)


def hidden(model, row: Row) -> Tensor:
    """The last hidden states (L, D) that predict the response tokens, float32."""
    ids = torch.tensor([[*row["prompt_ids"].tolist(), *row["response_ids"].tolist()]])
    return model.model(ids, use_cache=False).last_hidden_state[0, len(row["prompt_ids"]) - 1 : -1].float()


def make_teachers() -> dict[str, Any]:
    """Float64 models of their own for either branch."""
    return {"general": tiny_model(1).double().requires_grad_(False), "domain": tiny_model(2).double().requires_grad_(False)}


def output_weights() -> dict[str, Tensor]:
    """The weights of their output layers as the trainer gets them, float32."""
    return {name: teacher.lm_head.weight.float() for name, teacher in make_teachers().items()}


def make_rows(
    counts: Mapping[str, int], *, step: int = 0, drift: float = 0.8, top_k_of: str = "teacher", seed: int = 0, tied: bool = True
) -> tuple[list[Row], list[Row]]:
    """What was sampled and what the teachers say of it, in the form of the stages' tables.

    Prompts and responses are random. The engine has drifted from the student by up to ``drift`` nats a token, so that some
    importance weights leave their limits. Both branches use the same prompt ids.
    """
    rng = random.Random(seed)
    student, teachers = tiny_model(tied=tied).double(), make_teachers()
    rollouts, scored = [], []
    for branch, count in counts.items():
        for index in range(count):
            length = rng.randint(1, 6)
            key = {"prompt_id": f"p{index // 2}", "sample_index": index % 2, "branch": branch, "step": step}
            row = {
                **key,
                "prompt_ids": np.array([rng.randrange(SHARED) for _ in range(rng.randint(1, 5))], np.int32),
                "response_ids": np.array([rng.randrange(SHARED) for _ in range(length)], np.int32),
                "finish_reason": "stop",
            }
            with torch.no_grad():
                own, theirs = exact(student, row).numpy(), exact(teachers[branch], row).numpy()
            engine = np.log(own) + np.array([[rng.uniform(-drift, drift)] for _ in range(length)])
            ids = np.argsort(-(theirs if top_k_of == "teacher" else own))[:, :K].astype(np.int32)
            sampled = np.arange(length), row["response_ids"]
            row["logprobs"] = engine[sampled].astype(np.float32)
            row["topk_ids"] = ids
            row["student_topk_logprobs"] = np.log(np.take_along_axis(own, ids, -1)).astype(np.float32)
            top = np.log(np.take_along_axis(theirs, ids, -1)).astype(np.float32)
            teacher_logprobs = np.log(theirs[sampled]).astype(np.float32)
            rollouts.append(row)
            says = {"teacher_logprobs": teacher_logprobs, "topk_ids": ids, "topk_logprobs": top}
            scored.append(key | says | {"teacher_hidden": hidden(teachers[branch], row)})
    return rollouts, scored


def keep_by_mass(rollouts: Sequence[Row], scored: Sequence[Row], mass: float, positive: bool) -> list[Row]:
    """Section 4, for one branch's batch: the rows with most of the gap, each with what its teacher says."""
    rows = [{**row, **teacher} for row, teacher in zip(rollouts, scored, strict=True)]
    if mass == 1:
        return rows
    for row in rows:
        gaps = [float(t) - float(s) for t, s in zip(row["teacher_logprobs"], row["logprobs"], strict=True)]
        row["gap"] = sum(max(gap, 0.0) if positive else abs(gap) for gap in gaps) / len(gaps)
    rows.sort(key=lambda row: -row["gap"])
    kept: list[Row] = []
    while sum(row["gap"] for row in kept) < mass * sum(row["gap"] for row in rows):
        kept.append(rows[len(kept)])
    return kept


def step_loss(
    model,
    kept: Sequence[Row],
    *,
    signal: str,
    advantage: Advantage,
    scale: Mapping[str, float],
    teachers: Mapping[str, Any],
    limits: tuple[float, float] | None = (0.5, 2.0),
) -> Tensor:
    """Section 2 over the selected rows of one step, or, for a dense signal, the expectation over the candidates (section 9)."""
    total = torch.zeros((), dtype=torch.float64)
    for row in kept:
        p = exact(model, row)
        q = exact(teachers[row["branch"]], row).numpy() if signal == "full" else None
        inner = torch.zeros((), dtype=torch.float64)
        for t, y in enumerate(row["response_ids"].tolist()):
            ratio = p[t, y].item() / math.exp(row["logprobs"][t])
            weight = 1.0 if limits is None else ratio * (limits[0] <= ratio <= limits[1])
            if signal == "sampled":
                a = advantage(math.exp(row["teacher_logprobs"][t]), p[t, y].item())
                inner = inner - weight * a * p[t, y].log()
            elif weight:
                ids = range(SHARED) if q is not None else row["topk_ids"][t].tolist()
                theirs = list(q[t]) if q is not None else [math.exp(value) for value in row["topk_logprobs"][t]]
                own = [p[t, v] for v in ids]
                if q is None:
                    own, theirs = [*own, 1 - sum(own)], [*theirs, 1 - sum(theirs)]
                inner = inner - sum(s * advantage(o, s.item()) for s, o in zip(own, theirs, strict=True))
        total = total + scale[row["branch"]] * inner / len(row["response_ids"])
    return total / len(kept)
