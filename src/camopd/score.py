"""Stage 3: a teacher says how likely the student's tokens are. One branch, one teacher a call; branches run side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from camopd import plan as layout
from camopd.config import Recipe
from camopd.engines import Engine, token_batches
from camopd.errors import StoreError
from camopd.plan import Plan
from camopd.progress import Progress
from camopd.records import read_metadata, read_table, write_table
from camopd.rollout import TABLE as ROLLOUTS
from camopd.rollout import asks_student, engine_at
from camopd.runtime import set_threads
from camopd.shards import Shard, finished_parts, joined, joined_rates, key_of, part_config, rates, shard_uri
from camopd.store import Manifest, Store, join

Row = Mapping[str, Any]
TABLE = "scored.parquet"


def is_scored(row: Row, recipe: Recipe) -> bool:
    """Whether there is anything to score: a token, and not an end token alone unless the recipe says so."""
    finished = ("stop", "length", "empty") if recipe.score.empty_answers == "score" else ("stop", "length")
    return row["finish_reason"] in finished and len(row["response_ids"]) > 0


def score_rows(
    engine: Engine, rows: Sequence[Row], plan: Plan, advance: Callable[[int], None] = lambda tokens: None
) -> list[dict[str, Any]]:
    """The teacher's log-probabilities of one branch's samples, by sample key; what cannot be scored is left out.

    For the full signal its hidden states come with them (``teacher_hidden``), so that the loss asks the teacher no second time.

    Args:
        engine: the branch's teacher.
        rows: samples with prompt_ids, response_ids and, for the student's top k, topk_ids.
        plan: the run's plan.
        advance: told of the tokens of each scored response.
    """
    recipe = plan.recipe
    scored = [row for row in rows if is_scored(row, recipe)]
    top_k = min(recipe.score.top_k, plan.vocab_size) if recipe.score.signal == "topk" else 0
    results = engine.score(
        [row["prompt_ids"] for row in scored],
        [row["response_ids"] for row in scored],
        top_k=0 if asks_student(recipe) else top_k,
        ids=[row["topk_ids"] for row in scored] if asks_student(recipe) else None,
        hidden=recipe.score.signal == "full",
    )
    found: list[dict[str, Any]] = [{} for _ in scored]
    for index, scores in results:
        key = {name: scored[index][name] for name in ("prompt_id", "sample_index", "branch", "step")}
        values = {"teacher_logprobs": scores.logprobs, "topk_ids": scores.topk_ids, "topk_logprobs": scores.topk_logprobs}
        found[index] = key | values | ({} if scores.hidden is None else {"teacher_hidden": scores.hidden})
        advance(len(scores.logprobs))
    return found


def run(round_uri: str, branch_name: str, *, shard: Shard | None = None, store: Store | None = None) -> Manifest:
    """Write ``scored.parquet`` of one branch of a round.

    The teacher scores the student's token ids as they are: prompts are rendered once, in `prepare`, and never again.

    Args:
        round_uri: ``<run>/rounds/0001``, rolled out.
        branch_name: the branch whose teacher scores its samples.
        shard: the part to score, under a prefix of its own; None is the whole.
        store: where to read and write.

    Raises:
        StoreError: the rollouts were made under another chat template than the plan's.
    """
    store = store or Store()
    run_uri, number = layout.run_and_round(round_uri)
    plan = Plan.load(store, run_uri)
    recipe, branch = plan.recipe, plan.recipe.branch(branch_name)
    config, inputs = scoring_config(recipe), _inputs(plan, round_uri, branch_name, store)

    def write(folder: Path) -> dict[str, Any]:
        set_threads(recipe.num_threads)
        rows = samples_of(plan, round_uri, branch_name, store)
        rows = rows if shard is None else share(rows, shard, recipe)
        progress = Progress(
            "score",
            total=len(rows),
            unit="samples",
            round_number=number,
            num_rounds=recipe.num_rounds,
            branch=branch_name if shard is None else f"{branch_name} {shard}",
            waited=store.waited,
        )
        scored, seconds = [], 0.0
        if rows:
            with engine_at(plan, plan.teacher_uri(branch), store) as engine:
                begun = time.monotonic()
                scored = score_rows(engine, rows, plan, lambda tokens: progress.advance(1, tokens=tokens))
                seconds = time.monotonic() - begun
        write_table(folder / TABLE, "scored", scored)
        numbers = headline(scored, rows)
        return numbers | rates(numbers["tokens"], seconds)

    uri = shard_uri(layout.score_uri(round_uri, branch_name), shard)
    return store.produce(uri, stage="score", config=part_config(config, shard), inputs=inputs, write=write)


def join_shards(round_uri: str, branch_name: str, *, store: Store) -> Manifest:
    """Make a branch's scores from their shards: the same table as if one pod had scored it.

    Args:
        round_uri: ``<run>/rounds/0001``, rolled out, every shard of which is scored.
        branch_name: the branch.
        store: where to read and write.

    Raises:
        StoreError: a shard is not finished, or a sample's scores are missing or there twice.
    """
    run_uri, _ = layout.run_and_round(round_uri)
    plan, uri = Plan.load(store, run_uri), layout.score_uri(round_uri, branch_name)
    config, inputs = scoring_config(plan.recipe), _inputs(plan, round_uri, branch_name, store)

    def write(folder: Path) -> dict[str, Any]:
        parts = finished_parts(uri, plan.recipe.shards, config, inputs, store)
        tables = {part: read_table(store.fetch(join(part, TABLE)), "scored") for part in parts}
        rows = samples_of(plan, round_uri, branch_name, store)
        scored = joined(uri, [key_of(row) for row in rows if is_scored(row, plan.recipe)], tables)
        write_table(folder / TABLE, "scored", scored)
        numbers = headline(scored, rows)
        return numbers | joined_rates(numbers["tokens"], parts.values())

    return store.produce(uri, stage="score", config=config, inputs=inputs, write=write)


def samples_of(plan: Plan, round_uri: str, branch_name: str, store: Store) -> list[dict[str, Any]]:
    """A branch's samples of a round. Raises StoreError when they were made under another chat template than the plan's."""
    uri = layout.rollout_uri(round_uri)
    table = store.fetch(join(uri, ROLLOUTS))
    if read_metadata(table).get("template_id") != plan.template_id:
        raise StoreError(f"{uri} was sampled under another chat template than the plan's; remove it and roll out again")
    return [row for row in read_table(table, "rollouts") if row["branch"] == branch_name]


def share(rows: Sequence[dict[str, Any]], shard: Shard, recipe: Recipe) -> list[dict[str, Any]]:
    """The samples of one shard, in their order: every so many of the batches that an engine makes of them."""
    scored = [row for row in rows if is_scored(row, recipe)]
    lengths = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in scored]
    return [scored[index] for index in shard.share(token_batches(lengths, recipe.score.batch_tokens))]


def scoring_config(recipe: Recipe) -> dict[str, Any]:
    """The settings that shape a teacher's scores."""
    return recipe.score.model_dump(mode="json", include={"signal", "top_k", "top_k_of", "empty_answers", "batch_tokens"})


def _inputs(plan: Plan, round_uri: str, branch_name: str, store: Store) -> dict[str, str]:
    rollout = store.require(layout.rollout_uri(round_uri)).content_id
    return {"rollout": rollout, "teacher": plan.content_ids[f"teacher/{branch_name}"]}


def headline(scored: Sequence[Row], rollouts: Sequence[Row]) -> dict[str, Any]:
    """Mean per-token gap |log pi_T - log pi_theta| and the teacher's mean top-k mass of a branch."""
    student = {(row["prompt_id"], row["sample_index"]): row["logprobs"] for row in rollouts}
    numbers: dict[str, Any] = {"num_samples": len(scored), "tokens": sum(len(row["teacher_logprobs"]) for row in scored)}
    if scored:
        gaps = [row["teacher_logprobs"] - student[row["prompt_id"], row["sample_index"]] for row in scored]
        numbers["mean_gap"] = float(np.abs(np.concatenate(gaps)).mean())
    if scored and scored[0]["topk_logprobs"].shape[1]:
        numbers["topk_mass"] = float(np.exp(np.concatenate([row["topk_logprobs"] for row in scored])).sum(-1).mean())
    return numbers
