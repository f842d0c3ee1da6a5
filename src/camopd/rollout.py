"""Stage 2: the student answers the round's prompts. One model load for all branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camopd import plan as layout
from camopd.engines import Sample, load_engine
from camopd.errors import UnhealthyRunError
from camopd.plan import Plan
from camopd.progress import Progress
from camopd.records import read_prompts, write_table
from camopd.runtime import set_threads
from camopd.schedule import Schedule, prompt_slice, seed_of
from camopd.store import Manifest, Store, join


def requests(plan: Plan, number: int) -> list[dict[str, Any]]:
    """What round ``number`` samples: branch, optimiser step, row of the prompt table and sample index of each response.

    The sample index counts how often the run has sampled the prompt, so (prompt id, sample index) is unique in the run.
    """
    per_step, repeats = plan.recipe.rollout.prompts_per_step, plan.recipe.rollout.samples_per_prompt
    start = Schedule.of(plan.recipe.branches, (number - 1) * plan.steps_per_round)
    wanted = []
    for at in start.ahead(plan.steps_per_round):
        rows = prompt_slice(
            num_prompts=plan.num_prompts[at.active],
            seed=plan.recipe.seed,
            branch=at.active,
            start=at.turns() * per_step,
            count=per_step,
        )
        wanted += [
            {"branch": at.active, "step": at.step, "row": row, "sample_index": epoch * repeats + repeat}
            for row, epoch in rows
            for repeat in range(repeats)
        ]
    return wanted


def is_empty(token_ids: Sequence[int], eos_ids: Sequence[int]) -> bool:
    """A response without any token but end tokens: there is nothing a teacher could say about it."""
    return all(token in eos_ids for token in token_ids)


def health(rows: Sequence[Mapping[str, Any]], plan: Plan, first: Mapping[str, Any]) -> dict[str, Any]:
    """Headline numbers by branch: mean length, share cut at the limit, share empty, entropy, share of invalid ids.

    Args:
        rows: the round's responses.
        plan: the run's plan.
        first: the headline numbers of round 1, which lengths are compared with; empty in round 1 itself.

    Raises:
        UnhealthyRunError: more empty responses than ``rollout.max_empty_fraction``, or longer ones than
            ``rollout.max_length_growth`` times round 1's.
    """
    limits = plan.recipe.rollout
    numbers: dict[str, Any] = {}
    for branch in plan.recipe.branches:
        own = [row for row in rows if row["branch"] == branch.name]
        empty = sum(row["finish_reason"] == "empty" for row in own) / len(own)
        if empty > limits.max_empty_fraction:
            raise UnhealthyRunError(
                f"{empty:.0%} of the student's responses on branch {branch.name!r} are empty, more than "
                f"rollout.max_empty_fraction = {limits.max_empty_fraction:.0%}; check the chat template and the end tokens"
            )
        length = sum(len(row["response_ids"]) for row in own) / len(own)
        usual = first.get(f"{branch.name}/mean_length", length)
        if length > limits.max_length_growth * usual:
            raise UnhealthyRunError(
                f"responses on branch {branch.name!r} have grown from {usual:.0f} to {length:.0f} tokens on average, more than "
                f"rollout.max_length_growth = {limits.max_length_growth:g} times; lower train.learning_rate or max_new_tokens"
            )
        numbers |= {
            f"{branch.name}/mean_length": length,
            f"{branch.name}/cut_share": sum(row["finish_reason"] == "length" for row in own) / len(own),
            f"{branch.name}/empty_share": empty,
            f"{branch.name}/invalid_share": sum(row["finish_reason"] == "invalid" for row in own) / len(own),
            f"{branch.name}/entropy": sum(row["entropy"] for row in own) / len(own),
        }
    return numbers


def finish_reason(sample: Sample, plan: Plan) -> str:
    """``stop``, ``length``, ``empty`` (only end tokens) or ``invalid`` (an id the tokenizer does not have). Only the first
    two are scored."""
    if any(token >= plan.vocab_size for token in sample.token_ids):
        return "invalid"
    return "empty" if is_empty(sample.token_ids, plan.eos_ids) else sample.finish_reason


def run(round_uri: str, *, store: Store | None = None) -> Manifest:
    """Write ``rollouts.parquet`` of a round: token ids, log-probabilities, entropy and finish reason of each response.

    Args:
        round_uri: ``<run>/rounds/0001``; the round before must have its checkpoint.
        store: where to read and write.

    Raises:
        UnhealthyRunError: too many empty responses.
    """
    store = store or Store()
    run_uri, number = layout.run_and_round(round_uri)
    plan = Plan.load(store, run_uri)
    student_uri = plan.student_uri(number)
    inputs = {
        "plan": store.require(layout.plan_uri(run_uri)).content_id,
        "student": plan.content_ids["student"] if number == 1 else store.require(student_uri).content_id,
    }
    recipe = plan.recipe

    def write(folder: Path) -> dict[str, Any]:
        from transformers import AutoTokenizer

        set_threads(recipe.num_threads)
        wanted = requests(plan, number)
        for branch in recipe.branches:
            table = store.fetch(join(layout.plan_uri(run_uri), layout.prompts_file(branch.name)))
            own = [request for request in wanted if request["branch"] == branch.name]
            for request, prompt in zip(own, read_prompts(table, [r["row"] for r in own]), strict=True):
                request |= {"prompt_id": prompt["prompt_id"], "prompt_ids": prompt["token_ids"]}
        path = store.fetch(student_uri)
        tokenizer = AutoTokenizer.from_pretrained(store.fetch(recipe.student), local_files_only=True)
        engine = load_engine(
            recipe.rollout.engine,
            path,
            vocab_size=plan.vocab_size,
            batch_size=recipe.rollout.batch_size,
            batch_tokens=recipe.score.batch_tokens,
        )
        progress = Progress(
            "rollout",
            total=len(wanted),
            unit="samples",
            round_number=number,
            num_rounds=recipe.num_rounds,
            branch="all branches",
        )
        samples = engine.sample(
            [request["prompt_ids"] for request in wanted],
            [seed_of(recipe.seed, "rollout", r["branch"], r["prompt_id"], r["sample_index"]) for r in wanted],
            max_new_tokens=recipe.rollout.max_new_tokens,
            eos_ids=plan.eos_ids,
        )
        for index, sample in samples:
            wanted[index] |= {
                "response_ids": sample.token_ids,
                "logprobs": sample.logprobs,
                "entropy": sample.entropy,
                "finish_reason": finish_reason(sample, plan),
                "text": tokenizer.decode(sample.token_ids, skip_special_tokens=True),
            }
            progress.advance(1, tokens=len(sample.token_ids))
        first = store.require(layout.rollout_uri(layout.round_uri(run_uri, 1))).metrics if number > 1 else {}
        numbers = health(wanted, plan, first)
        write_table(folder / "rollouts.parquet", "rollouts", wanted, {"template_id": plan.template_id})
        return numbers | {"num_samples": len(wanted), "tokens": sum(len(row["response_ids"]) for row in wanted)}

    config = recipe.rollout.model_dump(mode="json") | {"seed": recipe.seed, "cycles_per_round": recipe.cycles_per_round}
    return store.produce(layout.rollout_uri(round_uri), stage="rollout", config=config, inputs=inputs, write=write)
