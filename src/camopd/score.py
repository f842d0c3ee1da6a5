"""Stage 3: a teacher says how likely the student's tokens are. One branch, one teacher a call; branches run side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from camopd import plan as layout
from camopd.engines import load_engine
from camopd.errors import StoreError
from camopd.plan import Plan
from camopd.progress import Progress
from camopd.records import read_metadata, read_table, write_table
from camopd.runtime import set_threads
from camopd.store import Manifest, Store, join

SCORED_REASONS = ("stop", "length")  # empty and invalid responses have nothing to score


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
    top_k = min(recipe.score.top_k, plan.vocab_size) if recipe.score.signal == "topk" else 0

    def write(folder: Path) -> dict[str, Any]:
        set_threads(recipe.num_threads)
        table = store.fetch(join(rollout_uri, "rollouts.parquet"))
        if read_metadata(table).get("template_id") != plan.template_id:
            raise StoreError(
                f"{rollout_uri} was sampled under another chat template than the plan's; remove it and roll out again"
            )
        rows = [row for row in read_table(table, "rollouts") if row["branch"] == branch_name]
        rows = [row for row in rows if row["finish_reason"] in SCORED_REASONS]
        engine = load_engine(
            recipe.rollout.engine,
            store.fetch(plan.teacher_uri(branch)),
            vocab_size=plan.vocab_size,
            batch_size=recipe.rollout.batch_size,
            batch_tokens=recipe.score.batch_tokens,
        )
        progress = Progress(
            "score", total=len(rows), unit="samples", round_number=number, num_rounds=recipe.num_rounds, branch=branch_name
        )
        prompts, responses = [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows]
        for index, scores in engine.score(prompts, responses, top_k=top_k):
            rows[index] |= {
                "teacher_logprobs": scores.logprobs,
                "topk_ids": scores.topk_ids,
                "topk_logprobs": scores.topk_logprobs,
                "tail_mass": scores.tail_mass,
            }
            progress.advance(1, tokens=len(rows[index]["response_ids"]))
        write_table(folder / "scored.parquet", "scored", rows)
        return headline(rows)

    config = {"signal": recipe.score.signal, "top_k": top_k, "batch_tokens": recipe.score.batch_tokens}
    return store.produce(layout.score_uri(round_uri, branch_name), stage="score", config=config, inputs=inputs, write=write)


def headline(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean per-token gap |log pi_T - log pi_theta| and mean top-k mass of a branch."""
    gaps = [abs(t - s) for row in rows for t, s in zip(row["teacher_logprobs"], row["logprobs"], strict=True)]
    tails = [mass for row in rows for mass in row["tail_mass"]]
    numbers: dict[str, Any] = {"num_samples": len(rows), "tokens": len(gaps)}
    if gaps:
        numbers["mean_gap"] = sum(gaps) / len(gaps)
    if tails:
        numbers["topk_mass"] = 1 - sum(tails) / len(tails)
    return numbers
