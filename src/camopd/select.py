"""Gap-based selection: keep the samples that hold most of the batch's teacher-student gap (method section 4).

Everything but ``run`` is pure and deterministic: ties break by sample key, so input order never matters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from camopd import plan as layout
from camopd.plan import Plan
from camopd.records import read_table, write_table
from camopd.store import Manifest, Store, join

Key = tuple[str, int]  # prompt id, sample index


def gap_score(teacher_logprobs: np.ndarray, student_logprobs: np.ndarray, rule: Literal["absolute", "positive"]) -> float:
    """Mean over a response's tokens of |log pi_T - log pi_theta| or of max(log pi_T - log pi_theta, 0), in nats.

    Args:
        teacher_logprobs: log-probability of each sampled token under the teacher (L,), L >= 1.
        student_logprobs: the same under the student (L,).
        rule: ``absolute`` for a branch that recovers, ``positive`` for one that retains.
    """
    gaps = np.asarray(teacher_logprobs, np.float64) - np.asarray(student_logprobs, np.float64)
    return float(np.mean(np.abs(gaps) if rule == "absolute" else np.maximum(gaps, 0)))


def kl_score(teacher_logprobs: np.ndarray, student_logprobs: np.ndarray) -> float:
    """Mean over a response's tokens of KL(student || teacher) over K tokens and one bucket for the rest, in nats.

    In place of the one gap that happened to be sampled, its expectation (method section 8).

    Args:
        teacher_logprobs: of the student's K most likely tokens at each position (L, K), L >= 1.
        student_logprobs: the same under the student (L, K).
    """
    student, teacher = (_with_tail(np.asarray(values, np.float64)) for values in (student_logprobs, teacher_logprobs))
    return max(float(np.mean(np.sum(np.exp(student) * (student - teacher), -1))), 0.0)


def _with_tail(logprobs: np.ndarray) -> np.ndarray:
    """Add one column for the probability that is left over."""
    tail = np.log(np.clip(1 - np.exp(logprobs).sum(-1, keepdims=True), 1e-9, None))
    return np.concatenate([logprobs, tail], -1)


@dataclass(frozen=True)
class Choice:
    """What selection says of one sample: its place, the share of mass up to and including it, and the verdict."""

    rank: int
    cumulative_share: float
    kept: bool
    reason: Literal["in prefix", "below mass", "no gap in batch"]


def select_by_mass(scores: Mapping[Key, float], mass: float, *, floor: float = 0.0) -> dict[Key, Choice]:
    """Keep the shortest prefix, highest score first, whose scores add up to at least ``mass`` times the total.

    A batch without a gap (the domain branch before the first update) keeps every sample: to rank rounding errors would drop
    most of them by chance.

    Args:
        scores: non-negative, finite gap of each sample.
        mass: share rho of the total, in (0, 1]; 1 is no selection and keeps samples without a gap, too.
        floor: mean score, nats a token, up to which a batch counts as having no gap.
    """
    if not all(math.isfinite(score) and score >= 0 for score in scores.values()):
        raise ValueError("selection needs finite, non-negative scores")
    ordered = sorted(scores, key=lambda key: (-scores[key], key))
    total = math.fsum(scores.values())
    if total <= floor * len(scores):
        return {key: Choice(rank, 1.0, True, "no gap in batch") for rank, key in enumerate(ordered, 1)}
    # Prefix sums are rounded: the slack keeps a mass just below 1 from asking for more than the sum of all.
    needed = mass * total * (1 - 1e-12) if mass < 1 else math.inf
    reached, done = 0.0, False
    choices = {}
    for rank, key in enumerate(ordered, 1):
        kept = not done
        reached += scores[key]
        done = done or reached >= needed
        choices[key] = Choice(rank, min(reached / total, 1.0), kept, "in prefix" if kept else "below mass")
    return choices


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many were kept, their share of the gap mass, and whether the choice prefers long responses."""
    rows = list(rows)
    kept, dropped = [r for r in rows if r["kept"]], [r for r in rows if not r["kept"]]
    total = math.fsum(r["score"] for r in rows)
    return {
        "num_samples": len(rows),
        "num_kept": len(kept),
        "kept_mass": math.fsum(r["score"] for r in kept) / total if total else 1.0,
        "mean_score": total / len(rows),
        "mean_length_kept": _mean(r["num_tokens"] for r in kept),
        "mean_length_dropped": _mean(r["num_tokens"] for r in dropped),
    }


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return math.fsum(values) / len(values) if values else None


def sample_score(sample: Mapping[str, Any], scored: Mapping[str, Any], rule: Literal["absolute", "positive", "kl"]) -> float:
    """The gap of one sample by the branch's rule."""
    if rule == "kl":
        return kl_score(scored["topk_logprobs"], sample["student_topk_logprobs"])
    return gap_score(scored["teacher_logprobs"], sample["logprobs"], rule)


def select_rows(rollouts: Iterable[Mapping[str, Any]], scored: Iterable[Mapping[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Selection of a round: every (step, branch) batch by itself, in rank order. Samples without a score are left out."""
    teachers = {(row["branch"], row["prompt_id"], row["sample_index"]): row for row in scored}
    rows = []
    by_batch = itemgetter("step", "branch")
    for (step, name), batch in groupby(sorted(rollouts, key=by_batch), key=by_batch):
        branch = plan.recipe.branch(name)
        lengths, scores = {}, {}
        for sample in batch:
            key = (sample["prompt_id"], sample["sample_index"])
            teacher = teachers.get((name, *key))
            if teacher is not None:
                lengths[key] = len(sample["response_ids"])
                scores[key] = sample_score(sample, teacher, branch.score)
        for (prompt_id, sample_index), choice in select_by_mass(scores, branch.mass, floor=plan.recipe.score.floor).items():
            key = (prompt_id, sample_index)
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "sample_index": sample_index,
                    "branch": name,
                    "step": step,
                    "num_tokens": lengths[key],
                    "score": scores[key],
                    "rank": choice.rank,
                    "cumulative_share": choice.cumulative_share,
                    "kept": choice.kept,
                    "reason": choice.reason,
                }
            )
    return rows


def run(round_uri: str, *, store: Store | None = None) -> Manifest:
    """Write ``selection.parquet`` (who was kept and why) and ``summary.json`` (by branch) of a round.

    Args:
        round_uri: ``<run>/rounds/0001``, rolled out and scored on every branch.
        store: where to read and write.
    """
    store = store or Store()
    run_uri, number = layout.run_and_round(round_uri)
    plan = Plan.load(store, run_uri)
    rollout_uri = layout.rollout_uri(round_uri)
    score_uris = {branch.name: layout.score_uri(round_uri, branch.name) for branch in plan.active_branches(number)}
    inputs = {"rollout": store.require(rollout_uri).content_id}
    inputs |= {f"score/{name}": store.require(uri).content_id for name, uri in score_uris.items()}

    def write(folder: Path) -> dict[str, Any]:
        rollouts = read_table(store.fetch(join(rollout_uri, "rollouts.parquet")), "rollouts")
        scored = [row for uri in score_uris.values() for row in read_table(store.fetch(join(uri, "scored.parquet")), "scored")]
        rows = select_rows(rollouts, scored, plan)
        write_table(folder / "selection.parquet", "selection", rows)
        by_branch = itemgetter("branch")
        summary = {name: summarise(group) for name, group in groupby(sorted(rows, key=by_branch), key=by_branch)}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
        return {f"{name}/{key}": value for name, part in summary.items() for key, value in part.items() if value is not None}

    config: dict[str, Any] = {branch.name: {"mass": branch.mass, "score": branch.score} for branch in plan.recipe.branches}
    config["floor"] = plan.recipe.score.floor
    return store.produce(layout.select_uri(round_uri), stage="select", config=config, inputs=inputs, write=write)
