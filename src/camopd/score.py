"""Stage 3: a teacher says how likely the student's tokens are. One branch, one teacher a call; branches run side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from camopd import plan as layout
from camopd.config import Recipe
from camopd.engines import Engine
from camopd.errors import StoreError
from camopd.plan import Plan
from camopd.progress import Progress
from camopd.records import read_metadata, read_table, write_table
from camopd.rollout import asks_student, engine_at
from camopd.runtime import set_threads
from camopd.store import Manifest, Store, join

Row = Mapping[str, Any]


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


def run(round_uri: str, branch_name: str, *, store: Store | None = None) -> Manifest:
    """Write ``scored.parquet`` of one branch of a round.

    The teacher scores the student's token ids as they are: prompts are rendered once, in `prepare`, and never again.

    Args:
        round_uri: ``<run>/rounds/0001``, rolled out.
        branch_name: the branch whose teacher scores its samples.
        store: where to read and write.

    Raises:
        StoreError: the rollouts were made under another chat template than the plan's.
    """
    store = store or Store()
    run_uri, number = layout.run_and_round(round_uri)
    plan = Plan.load(store, run_uri)
    recipe, branch = plan.recipe, plan.recipe.branch(branch_name)
    rollout_uri = layout.rollout_uri(round_uri)
    inputs = {
        "rollout": store.require(rollout_uri).content_id,
        "teacher": plan.content_ids[f"teacher/{branch_name}"],
    }

    def write(folder: Path) -> dict[str, Any]:
        set_threads(recipe.num_threads)
        table = store.fetch(join(rollout_uri, "rollouts.parquet"))
        if read_metadata(table).get("template_id") != plan.template_id:
            raise StoreError(
                f"{rollout_uri} was sampled under another chat template than the plan's; remove it and roll out again"
            )
        rows = [row for row in read_table(table, "rollouts") if row["branch"] == branch_name]
        progress = Progress(
            "score", total=len(rows), unit="samples", round_number=number, num_rounds=recipe.num_rounds, branch=branch_name
        )
        with engine_at(plan, plan.teacher_uri(branch), store) as engine:
            scored = score_rows(engine, rows, plan, lambda tokens: progress.advance(1, tokens=tokens))
        write_table(folder / "scored.parquet", "scored", scored)
        return headline(scored, rows)

    config = recipe.score.model_dump(mode="json", include={"signal", "top_k", "top_k_of", "empty_answers", "batch_tokens"})
    return store.produce(layout.score_uri(round_uri, branch_name), stage="score", config=config, inputs=inputs, write=write)


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
