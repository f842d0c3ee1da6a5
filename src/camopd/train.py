"""Stage 5: the round's updates, in the schedule's order, on the selected samples (method sections 2 and 3)."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from camopd import plan as layout
from camopd.config import Recipe
from camopd.engines.transformers import load_model, output_head, response_logprobs, token_batches
from camopd.errors import StoreError, UnhealthyRunError
from camopd.losses import Head, Terms, sampled_token_loss, token_weights, topk_loss
from camopd.plan import Plan
from camopd.progress import Progress
from camopd.records import read_table
from camopd.runtime import set_threads
from camopd.schedule import Schedule, seed_of
from camopd.store import Manifest, Store, join

OPTIMIZER = "trainer/optimizer.safetensors"
STATE = "trainer/state.json"
STEPS = "steps.json"
Row = Mapping[str, Any]


# --- One update -----------------------------------------------------------------------------------------------------------


def micro_batch_loss(
    model: PreTrainedModel, head: Head, rows: Sequence[Row], *, recipe: Recipe, vocab_size: int, num_selected: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The micro-batch's part of the step's loss, and per-token sums for the metrics.

    Args:
        model: the student, in evaluation mode (a dropout would make the ratio to the engine meaningless).
        head: its output layer.
        rows: samples with prompt_ids, response_ids, logprobs (the engine's), teacher_logprobs or topk columns, and branch.
        recipe: objective and limits.
        vocab_size: shared token ids.
        num_selected: selected samples of the whole step.
    """

    def flat(column: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([value for row in rows for value in row[column]], dtype=dtype, device=model.device)

    topk = recipe.score.signal == "topk"
    out = response_logprobs(
        model,
        head,
        [row["prompt_ids"] for row in rows],
        [row["response_ids"] for row in rows],
        vocab_size=vocab_size,
        chunk=recipe.train.logprob_chunk,
        ids_TK=flat("topk_ids", torch.long) if topk else None,
    )
    lengths = torch.tensor([len(row["response_ids"]) for row in rows], device=model.device)
    scale = torch.tensor([recipe.branch(row["branch"]).scale for row in rows], device=model.device)
    weight = token_weights(lengths, scale, num_selected)
    terms = Terms(weight, flat("logprobs"), recipe.train.ratio_low, recipe.train.ratio_high)
    if topk and out.chosen_TK is not None:
        loss, sums = topk_loss(out.sampled_T, out.chosen_TK, flat("topk_logprobs"), flat("tail_mass"), terms)
    else:
        clip = recipe.train.advantage_clip
        loss, sums = sampled_token_loss(out.sampled_T, flat("teacher_logprobs"), terms, advantage_clip=clip)
    drift = (out.sampled_T.detach() - terms.engine_T).abs().sum()
    return loss, sums | {"entropy": out.entropy_T.sum(), "engine_gap": drift}


def update(
    model: PreTrainedModel,
    head: Head,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    *,
    recipe: Recipe,
    vocab_size: int,
) -> dict[str, float]:
    """One optimiser step on the selected samples of one step; the parameters change only when everything is finite.

    Returns:
        loss, grad_norm (before clipping), and means over the selected tokens: kept_ratio (share with w_t > 0), gap, entropy,
        engine_gap (|log p_engine - log p_trainer|).

    Raises:
        UnhealthyRunError: the loss or the gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    total, sums = 0.0, dict.fromkeys(("kept", "gap", "entropy", "engine_gap"), 0.0)
    for batch in token_batches([len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows], recipe.train.batch_tokens):
        part = [rows[i] for i in batch]
        loss, counts = micro_batch_loss(model, head, part, recipe=recipe, vocab_size=vocab_size, num_selected=len(rows))
        loss.backward()
        total += loss.item()
        sums = {name: value + counts[name].item() for name, value in sums.items()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise UnhealthyRunError(
            f"loss {total} or gradient norm {norm} is not finite; lower train.learning_rate or look at the teachers' scores"
        )
    optimizer.step()
    tokens = sum(len(row["response_ids"]) for row in rows)
    means = {name: value / tokens for name, value in sums.items()}
    return {"loss": total, "grad_norm": norm, "kept_ratio": means.pop("kept"), **means}


# --- State between rounds -------------------------------------------------------------------------------------------------


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    train = recipe.train
    return torch.optim.AdamW(
        model.parameters(),
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        weight_decay=train.weight_decay,
        fused=True,
    )


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    seed: int,
    student: Path,
    template: bytes | None = None,
) -> None:
    """Write a model folder that anything can load, with the trainer's state in ``trainer/``.

    The generators' state is the seed: each round derives its own from it and the round's number.
    Tokenizer and generation settings are the student's own files, byte for byte; the chat template is the one that rendered the
    prompts, which is another where the recipe names one.
    """
    model.save_pretrained(folder)
    for path in student.iterdir():
        if path.is_file() and is_companion(path.name):
            shutil.copyfile(path, folder / path.name)
    if template is not None:
        (folder / layout.TEMPLATE).write_bytes(template)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[id(parameter)]}.{key}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    (folder / OPTIMIZER).parent.mkdir()
    save_file(moments, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps({"step": schedule.step, "cycle": schedule.cycle, "seed": seed}) + "\n")


def is_companion(name: str) -> bool:
    """Whether a file of a model folder belongs to the tokenizer or generation: neither weights nor what we write ourselves."""
    ours = {"config.json", "manifest.json", STEPS}
    return name not in ours and not name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".pt", ".md"))


def load_state(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Give the optimiser its moments back and return the optimiser steps done. Raises StoreError on another model's state."""
    moments = load_file(folder / OPTIMIZER)
    for name, parameter in model.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in moments]
        if len(keys) != 3:
            raise StoreError(f"{folder / OPTIMIZER} has no moments for {name}: the checkpoint belongs to another model")
        optimizer.state[parameter] = {
            key: moments[f"{name}.{key}"].to("cpu" if key == "step" else parameter.device) for key in keys
        }
    return json.loads((folder / STATE).read_text())["step"]


# --- The stage ------------------------------------------------------------------------------------------------------------


def selected_rows(rollouts: Iterable[Row], scored: Iterable[Row], selection: Iterable[Row]) -> dict[int, list[dict[str, Any]]]:
    """The kept samples of each optimiser step with everything the loss needs, joined by (prompt id, sample index)."""

    def key(row: Row) -> tuple[str, str, int]:
        return row["branch"], row["prompt_id"], row["sample_index"]

    kept = {key(row) for row in selection if row["kept"]}
    teachers = {key(row): row for row in scored}
    rows = [{**teachers[key(row)], **row} for row in rollouts if key(row) in kept]
    by_step = itemgetter("step")
    return {step: list(group) for step, group in groupby(sorted(rows, key=by_step), key=by_step)}


def check_fresh(engine_gap: float, limit: float) -> None:
    """Before the first update trainer and engine hold the same weights: a large gap means one of them does not.

    Raises:
        UnhealthyRunError: mean |log p_engine - log p_trainer| above ``limit`` nats (healthy 0.01 to 0.02, stale weights 0.2).
    """
    if engine_gap > limit:
        raise UnhealthyRunError(
            f"mean |log p_engine - log p_trainer| is {engine_gap:.3f} nats before the round's first update, above "
            f"train.max_engine_gap = {limit}: the rollouts are not this checkpoint's; remove the round's rollout"
        )


def run(round_uri: str, *, store: Store | None = None) -> Manifest:
    """Write the checkpoint of a round: a model folder, trainer state, and ``steps.json`` with the metrics of each update.

    The prefix appears as a whole or not at all, so a killed attempt starts the round's updates again from the round before:
    no update is applied twice.

    Args:
        round_uri: ``<run>/rounds/0001``, rolled out, scored and selected.
        store: where to read and write.

    Raises:
        UnhealthyRunError: stale weights, or a loss that is not finite.
    """
    store = store or Store()
    run_uri, number = layout.run_and_round(round_uri)
    plan = Plan.load(store, run_uri)
    recipe = plan.recipe
    prefixes = {"rollout": layout.rollout_uri(round_uri), "select": layout.select_uri(round_uri)}
    prefixes |= {f"score/{branch.name}": layout.score_uri(round_uri, branch.name) for branch in recipe.branches}
    student_uri = plan.student_uri(number)
    inputs = {name: store.require(uri).content_id for name, uri in prefixes.items()}
    inputs["student"] = plan.content_ids["student"] if number == 1 else store.require(student_uri).content_id

    def write(folder: Path) -> dict[str, Any]:
        begun = time.monotonic()
        set_threads(recipe.num_threads)
        torch.manual_seed(seed_of(recipe.seed, "train", number))
        student = store.fetch(student_uri)
        model = load_model(student)
        head, optimizer = output_head(model), make_optimizer(model, recipe)
        done = load_state(student, model, optimizer) if number > 1 else 0
        schedule = Schedule.of(recipe.branches, done)
        assert done == (number - 1) * plan.steps_per_round, "the checkpoint is not the round before's last step"

        rollouts = read_table(store.fetch(join(prefixes["rollout"], "rollouts.parquet")), "rollouts")
        scored = [
            row
            for branch in recipe.branches
            for row in read_table(store.fetch(join(prefixes[f"score/{branch.name}"], "scored.parquet")), "scored")
        ]
        chosen = selected_rows(
            rollouts, scored, read_table(store.fetch(join(prefixes["select"], "selection.parquet")), "selection")
        )

        progress = Progress(
            "train", total=plan.steps_per_round, unit="steps", round_number=number, num_rounds=recipe.num_rounds
        )
        steps: list[dict[str, Any]] = []
        for at in schedule.ahead(plan.steps_per_round):
            batch = [row for row in rollouts if row["step"] == at.step]
            rows = chosen.get(at.step)
            if not rows:
                raise UnhealthyRunError(
                    f"step {at.step} has no response with anything to score; see the round's rollouts.parquet"
                )
            numbers = update(model, head, optimizer, rows, recipe=recipe, vocab_size=plan.vocab_size)
            if not steps:
                check_fresh(numbers["engine_gap"], recipe.train.max_engine_gap)
            steps.append({"step": at.step, "branch": at.active, **numbers, **batch_numbers(batch, rows)})
            progress.advance(1, tokens=steps[-1]["tokens"], branch=at.active)
        used = join(layout.plan_uri(run_uri), layout.TEMPLATE)
        template = store.read(used) if store.stat(used) else None
        save_checkpoint(folder, model, optimizer, at.advance(), seed=recipe.seed, student=student, template=template)
        (folder / STEPS).write_text(json.dumps(steps, indent=1) + "\n")
        return headline(steps) | {"tokens_per_second": sum(s["tokens"] for s in steps) / (time.monotonic() - begun)}

    config = recipe.train.model_dump(mode="json") | {"signal": recipe.score.signal, "num_threads": recipe.num_threads}
    config |= {"cycle": Schedule.of(recipe.branches).cycle, "scale": {b.name: b.scale for b in recipe.branches}}
    return store.produce(layout.checkpoint_uri(round_uri), stage="train", config=config, inputs=inputs, write=write)


def batch_numbers(batch: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """Counts of one step: sampled and selected samples, tokens trained on, mean length and share cut of what was sampled."""
    return {
        "num_samples": len(batch),
        "num_selected": len(rows),
        "tokens": sum(len(row["response_ids"]) for row in rows),
        "mean_length": sum(len(row["response_ids"]) for row in batch) / len(batch),
        "cut_share": sum(row["finish_reason"] == "length" for row in batch) / len(batch),
    }


def headline(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the round's steps by branch, and the engine gap before the first update."""
    numbers: dict[str, float] = {"engine_gap": steps[0]["engine_gap"], "num_steps": len(steps)}
    for name in sorted({step["branch"] for step in steps}):
        own = [step for step in steps if step["branch"] == name]
        for key in ("loss", "gap", "grad_norm", "kept_ratio", "entropy", "mean_length"):
            numbers[f"{name}/{key}"] = sum(step[key] for step in own) / len(own)
    return numbers
