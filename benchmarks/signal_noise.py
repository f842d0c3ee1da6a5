"""How noisy is the gradient under each teacher signal? The same prompts, answered again and again by the same student.

    python benchmarks/signal_noise.py          # a few minutes; writes benchmarks/results/signal_noise.md

One batch of 64 prompts is answered 32 times. From the same answers each estimator makes its gradient of the same objective,
so what differs is the estimator alone. Noise is the standard deviation over the answers, E|g - E g|^2 under the root, as a
share of |E g| of the full signal; its square says how many times larger a batch would have to be for the same noise.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import study_ideas as ideas
import torch
from page import machine, table
from study import FULL, all_variants, recipe_of
from torch import Tensor

from camopd import prepare
from camopd.config import Recipe
from camopd.recover import Session
from camopd.schedule import seed_of
from camopd.store import Store
from camopd.update import rows_loss

Row = dict[str, Any]
RESULTS = Path(__file__).with_name("results") / "signal_noise.md"
BASELINE = "topk/alternating"
ANSWERS = 32
UPDATES = (0, 40, 120)  # of the baseline, before the student is looked at
RULES = {
    "sampled": ideas.plain,
    "control variate, exact": ideas.control_variate,
    "control variate, top 8": ideas.control_variate_top,
}


def gradient(session: Session, rows: list[Row], recipe: Recipe) -> Tensor:
    """Gradient of the step's loss (P,), on the CPU, float64."""
    trainer = session.trainer
    trainer.optimizer.zero_grad(set_to_none=True)
    loss, _ = rows_loss(
        trainer.model,
        rows,
        recipe=recipe,
        vocab_size=session.plan.vocab_size,
        num_selected=len(rows),
        teacher_weight=trainer.teacher_weights[rows[0]["branch"]],
    )
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).double().cpu()
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def answers(session: Session, branch: str, prompts: list[Row], repeat: int) -> list[Row]:
    """One fresh answer to each prompt."""
    plan, student = session.plan, session._samplers[branch]
    asked = [row["prompt_ids"] for row in prompts]
    seeds = [seed_of("noise", repeat, i) for i in range(len(prompts))]
    found = student.sample(asked, seeds, max_new_tokens=plan.recipe.rollout.max_new_tokens, eos_ids=plan.eos_ids)
    return [
        {"branch": branch, "prompt_ids": asked[i], "response_ids": sample.token_ids, "logprobs": sample.logprobs}
        for i, sample in found
    ]


def gradients(session: Session, branch: str, rows: list[Row], recipes: Mapping[str, Recipe]) -> dict[str, Tensor]:
    """The gradient by estimator, all of the same answers."""
    prompts, responses = [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows]
    teacher, student, vocab_size = session._teachers[branch], session._samplers[branch], session.plan.vocab_size
    found = {}
    for name, rule in RULES.items():
        ruled = dict(ideas.Ruled(teacher, student, rule, vocab_size).score(prompts, responses))
        own = [{**row, "teacher_logprobs": ruled[i].logprobs} for i, row in enumerate(rows)]
        found[name] = gradient(session, own, recipes["sampled"])
    dense = dict(teacher.score(prompts, responses, top_k=recipes["topk"].score.top_k, hidden=True))
    for i, scores in dense.items():
        said = {"topk_ids": scores.topk_ids, "topk_logprobs": scores.topk_logprobs, "teacher_hidden": scores.hidden}
        rows[i] = {**rows[i], **said}
    return found | {"top-8": gradient(session, rows, recipes["topk"]), "full": gradient(session, rows, recipes["full"])}


def measured(session: Session, branch: str, recipes: Mapping[str, Recipe]) -> list[list[str]]:
    """A row of the table for each estimator."""
    plan = session.plan
    size = plan.recipe.rollout.prompts_per_step
    wanted = [{"branch": branch, "table": "file", "row": row} for row in range(size)]
    session.tables.fill(wanted)
    seen: dict[str, list[Tensor]] = {}
    for repeat in range(ANSWERS):
        for name, found in gradients(session, branch, answers(session, branch, wanted, repeat), recipes).items():
            seen.setdefault(name, []).append(found)
    stacked = {name: torch.stack(parts) for name, parts in seen.items()}
    means = {name: parts.mean(0) for name, parts in stacked.items()}
    variances = {name: parts.var(0).sum().item() for name, parts in stacked.items()}
    # A mean of noisy gradients is longer than the mean gradient, by the variance that is left in it.
    length = math.sqrt(max(means["full"].square().sum().item() - variances["full"] / ANSWERS, 1e-300))
    rows = []
    for name, variance in variances.items():
        cosine = torch.cosine_similarity(means[name], means["full"], dim=0).item()
        noise = math.sqrt(variance) / length
        less = f"{variances['sampled'] / variance:.1f}" if variance else "no noise"  # every answer was the same
        rows.append([branch, name, f"{noise:.2f}", less, f"{cosine:.3f}"])
    return rows


def main() -> None:
    store, rows = Store(), []
    with tempfile.TemporaryDirectory(prefix="camopd-noise-") as output:
        baseline = next(variant for variant in all_variants() if variant.key == BASELINE)
        plan = prepare.run(recipe_of(baseline, 1, FULL, output), store=store)
        values = {name: plan.recipe.score.model_copy(update={"signal": name}) for name in ("sampled", "topk", "full")}
        recipes = {name: plan.recipe.model_copy(update={"score": score}) for name, score in values.items()}
        session = Session(replace(plan, recipe=recipes["full"]), 1, store)  # holds the teachers, too
        session.plan = session.trainer.plan = plan
        for updates in UPDATES:
            while session.trainer.schedule.step < updates:
                session.step()
            branches = ["general", "domain"] if updates else ["general"]  # before the first update there is no domain gap
            rows += [[str(updates), *row] for branch in branches for row in measured(session, branch, recipes)]
    header = ["updates", "branch", "estimator", "noise", "variance of sampled / its own", "cosine of the mean with full's"]
    text = "\n\n".join(
        [
            "# Noise of the gradient by teacher signal, on the micro example",
            f"`python benchmarks/signal_noise.py`, {machine(note='one thread')}. 64 prompts, answered {ANSWERS} "
            "times by the student after so "
            "many updates of `alternating` with the top-8 signal, seed 1. Noise is the standard deviation of a batch's "
            "gradient as a share of the length of the mean gradient under the full signal.",
            table(header, rows),
        ]
    )
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
