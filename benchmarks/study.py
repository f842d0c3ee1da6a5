"""Which method recovers most: presets, signals and options over seeds on the micro example, at two equal budgets.

    python benchmarks/study.py --seeds 6               # benchmarks/results/study.jsonl, docs/results.md and its plots
    python benchmarks/study.py --seeds 6 --only topk   # one group: sampled, topk, options or longer
    python benchmarks/study.py --quick                 # two seeds and few updates, to see it work; writes to .cache/study

Every variant is parameters on recipes/micro.toml, trained by `camopd.recover` and measured by the project's own harness.
*Equal rollouts*: 80 updates of 64 prompts. *Equal backward tokens*: as many tokens as `alternating` trained on with the same
seed and signal; what selects goes on until it has had them. Two processes of one thread each. A finished run is one line of
the results file, so a second call does only what is missing; after a change of the code remove the file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study_ideas import EXTRA_PRESETS, IDEAS, extra_presets
from study_numbers import YARDSTICK, Run, Size, Study, Variant
from study_report import PAPER, page

from camopd import plan as layout
from camopd import prepare
from camopd.config import Recipe, load_recipe
from camopd.errors import UnhealthyRunError
from camopd.plan import Plan
from camopd.presets import presets
from camopd.store import Store, digest, join

if TYPE_CHECKING:
    from camopd.evaluation.harness import Harness

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "micro.toml"
RESULTS = Path(__file__).with_name("results") / "study.jsonl"
PROCESSES = 2
FULL = Size(num_rounds=10, steps_per_round=8, prompts_per_step=64)
QUICK = Size(num_rounds=2, steps_per_round=8, prompts_per_step=64)
MOST = 8  # times the equal rollouts: where a run that selects hard ends, whatever tokens it has had

SIGNALS: dict[str, dict[str, Any]] = {
    # Answers of an end token alone must be scored, or their share rises until the run stops itself (docs/decisions.md).
    "sampled": {"score.signal": "sampled", "score.empty_answers": "score"},
    "topk": {"score.signal": "topk"},
}
STUDENTS_TOP = {"score.top_k_of": "student"}
BY_KL = {"branches.general.score": "kl", "branches.domain.score": "kl"}
HALF_THE_MASS = {"branches.general.mass": 0.5, "branches.domain.mass": 0.5}
HALF_MADE_UP = {"branches.general.teacher_prompts": 0.5, "branches.general.num_teacher_prompts": 3000}
ALL_MADE_UP = {"branches.general.prompts": "teacher", "branches.general.num_teacher_prompts": 3000}
TOPK, CAMOPD, SAMPLED = "topk/alternating-scaled", "topk/camopd", "sampled/alternating-scaled"


def turns(general: int, domain: int) -> dict[str, Any]:
    """General updates, then domain updates."""
    return {"branches.general.steps": general, "branches.domain.steps": domain}


FOUR_ANSWERS = {"rollout.samples_per_prompt": 4, "rollout.prompts_per_step": FULL.prompts_per_step // 4}
HALF_BATCHES = {"rollout.prompts_per_step": FULL.prompts_per_step // 2, "steps_per_round": 2 * FULL.steps_per_round}
# (baseline, name, parameters on top of the baseline's, idea of study_ideas)
OPTIONS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    (TOPK, "half of the prompts from the teacher", HALF_MADE_UP, ""),
    (TOPK, "all prompts from the teacher", ALL_MADE_UP, ""),
    (TOPK, "half from the teacher, 2:1", HALF_MADE_UP | turns(2, 1), ""),
    (TOPK, "half from the teacher, 1:1", HALF_MADE_UP | turns(1, 1), ""),
    (TOPK, "all from the teacher, 1:1", ALL_MADE_UP | turns(1, 1), ""),
    (TOPK, "1:1", turns(1, 1), ""),
    (TOPK, "7:1", turns(7, 1), ""),
    (TOPK, "merged start", {}, "merged start"),
    (TOPK, "merged start, 1:1", turns(1, 1), "merged start"),
    (TOPK, "merged start, half from the teacher, 1:1", HALF_MADE_UP | turns(1, 1), "merged start"),
    (TOPK, "pulled to the general teacher", {}, "pulled"),
    (TOPK, "full vocabulary", {"score.signal": "full"}, ""),
    (TOPK, "student's top 8", STUDENTS_TOP, ""),
    (TOPK, "top 1", {"score.top_k": 1}, ""),
    (TOPK, "top 16", {"score.top_k": 16}, ""),
    (TOPK, "forward KL", {"method": "forward"}, ""),
    (TOPK, "half reverse, half forward KL", {"method": "both-ways"}, ""),
    (TOPK, "Jensen-Shannon divergence", {"method": "jensen-shannon"}, ""),
    (TOPK, "schedule by gap and descent", {}, "gap and descent"),
    (TOPK, "schedule by gap and drift", {}, "gap and drift"),
    (TOPK, "spaced review", {}, "spaced review"),
    (TOPK, "two updates a batch", {}, "two updates"),
    (TOPK, "half of the batch, twice the updates", HALF_BATCHES, ""),
    (TOPK, "twice the rate", {"train.learning_rate": 4e-4}, ""),
    (TOPK, "twice the rate, decaying", {"train.learning_rate": 4e-4}, "decaying rate"),
    (TOPK, "moments by branch", {}, "own moments"),
    (TOPK, "prompt tokens too", {}, "prompt tokens"),
    (CAMOPD, "half of the gap mass", HALF_THE_MASS, ""),
    (CAMOPD, "student's top 8, selected by gap", STUDENTS_TOP, ""),
    (CAMOPD, "student's top 8, selected by KL", STUDENTS_TOP | BY_KL, ""),
    (CAMOPD, "half of the prompts from the teacher, selected", HALF_MADE_UP, ""),
    (SAMPLED, "control variate", {}, "control variate"),
    (SAMPLED, "control variate, top 8", {}, "control variate, top 8"),
    (SAMPLED, "token gate", {}, "token gate"),
    (SAMPLED, "explorers", FOUR_ANSWERS, "explorers"),
    (SAMPLED, "explorers and token gate", FOUR_ANSWERS, "explorers and token gate"),
    (SAMPLED, "empty answers left out", {"score.empty_answers": "skip"}, ""),
)
# Twice the rollouts, where prompts from the teacher have had the time that more kinds of prompts take.
LONGER: dict[str, dict[str, Any]] = {
    "recipe's prompts": {},
    "recipe's prompts, 1:1": turns(1, 1),
    "half from the teacher": HALF_MADE_UP,
    "half from the teacher, 2:1": HALF_MADE_UP | turns(2, 1),
    "half from the teacher, 1:1": HALF_MADE_UP | turns(1, 1),
    "all from the teacher, 1:1": ALL_MADE_UP | turns(1, 1),
}


def all_variants() -> list[Variant]:
    """Every preset with every signal that it is defined for, in the paper's order, and the options."""
    order = [*PAPER, *(name for name in presets() if name not in PAPER)]
    found = [
        Variant(signal, name, {"method": name, **parameters})
        for signal, parameters in SIGNALS.items()
        for name, preset in sorted(presets().items(), key=lambda item: order.index(item[0]))
        if signal in preset.signals and name not in EXTRA_PRESETS
    ]
    base = {variant.key: variant.parameters for variant in found}
    found += [Variant("options", name, {**base[other], **parameters}, other, idea) for other, name, parameters, idea in OPTIONS]
    twice = {**base[TOPK], "steps_per_round": 2 * FULL.steps_per_round}
    first = "longer/" + next(iter(LONGER))
    return found + [
        Variant("longer", name, {**twice, **parameters}, "" if f"longer/{name}" == first else first)
        for name, parameters in LONGER.items()
    ]


def recipe_of(variant: Variant, seed: int, size: Size, output: str) -> Recipe:
    """The recipe of a variant's run; a preset is allowed ``MOST`` times the equal rollouts."""
    parameters: dict[str, Any] = {
        "steps_per_round": size.steps_per_round,
        "rollout.prompts_per_step": size.prompts_per_step,
        **variant.parameters,
        "execution": "colocated",
        "num_rounds": size.num_rounds * (MOST if variant.group in SIGNALS else 1),
        "seed": seed,
        "output": output,
    }
    return load_recipe(RECIPE, parameters)


def identity(recipe: Recipe, idea: str, store: Store) -> str:
    """What makes a result what it is: settings, models, prompts, tasks and what is done differently."""
    content_ids, _ = prepare.resolve(recipe, store)
    assert recipe.evaluate.task_dir is not None
    tasks = store.content_id(recipe.evaluate.task_dir)
    return digest([layout.training_config(recipe, content_ids), tasks, idea]).removeprefix("sha256:")[:12]


# --- One run ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A run to make.

    Attributes:
        variant: what is run.
        seed: of sampling and prompt order.
        size: the equal rollouts.
        run_id: identity of the result.
        budget: tokens to go on to, once the equal rollouts are done.
    """

    variant: Variant
    seed: int
    size: Size
    run_id: str
    budget: int | None = None


@contextlib.contextmanager
def open_harness(plan: Plan, store: Store) -> Iterator[Harness]:
    """The project's harness on the recipe's tasks."""
    from camopd.evaluate import load_tokenizer
    from camopd.evaluation.harness import Harness, open_tasks

    recipe = plan.recipe
    names = [task for branch in recipe.branches for task in branch.tasks]
    with open_tasks(names, store.fetch(recipe.evaluate.task_dir or ""), seed=0) as tasks:
        yield Harness(tasks=tasks, tokenizer=load_tokenizer(plan, store), batch_size=recipe.evaluate.batch_size)


def scores_of(uris: Mapping[int, str], plan: Plan, store: Store) -> dict[int, dict[str, float]]:
    """Accuracy on each task of the models at some rounds."""
    from camopd.engines.transformers import load_model

    with open_harness(plan, store) as harness:
        return {
            number: {task: sum(a.score for a in answers) / len(answers) for task, answers in harness.evaluate(load_model(path))}
            for number, path in ((number, store.fetch(uri)) for number, uri in uris.items())
        }


def run(job: Job) -> Run:
    """Train until both budgets are reached, and measure at half of the rollouts, at all of them and at the token budget."""
    store = Store()
    tokens: list[int] = []
    seconds: list[float] = []
    clipped: list[int] = []
    stopped = ""
    with extra_presets(), tempfile.TemporaryDirectory(prefix="camopd-study-") as folder:
        plan = prepare.run(recipe_of(job.variant, job.seed, job.size, folder), store=store)
        begun = time.process_time()
        try:
            session = IDEAS[job.variant.idea](plan, 1, store)
            for number, uri in enumerate(plan.rounds, 1):
                session.round(number)
                steps = json.loads(store.read(join(layout.checkpoint_uri(uri), "steps.json")))
                tokens.append(sum(step["tokens"] for step in steps) + sum(tokens[-1:]))
                clipped.append(sum(step["grad_norm"] > plan.recipe.train.max_grad_norm for step in steps) + sum(clipped[-1:]))
                seconds.append(round(time.process_time() - begun, 2))
                if number >= job.size.num_rounds and tokens[-1] >= (job.budget or 0):
                    break
        except UnhealthyRunError as error:
            stopped = f"round {len(tokens) + 1}: {error}"
        made = Run(job.variant.key, job.seed, job.run_id, tuple(tokens), tuple(seconds), tuple(clipped), {}, stopped)
        measured = made.rounds_to_measure(job.size, job.budget)
        uris = {number: layout.checkpoint_uri(plan.rounds[number - 1]) for number in measured}
        return dataclasses.replace(made, scores=scores_of(uris, plan, store) if uris else {})


def run_references(size: Size) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy on each task of the start and of the general teacher."""
    store = Store()
    with tempfile.TemporaryDirectory(prefix="camopd-study-") as folder:
        plan = prepare.run(recipe_of(Variant("topk", "camopd", {}), 0, size, folder), store=store)
        teacher = next(branch for branch in plan.recipe.branches if branch.role == "recover")
        scores = scores_of({0: plan.recipe.student, 1: plan.recipe.teacher(teacher)}, plan, store)
        return scores[0], scores[1]


# --- All runs ---------------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[Run]:
    return [Run.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def current(path: Path, jobs: Sequence[Job]) -> list[Run]:
    """The results that belong to the jobs as they are now."""
    known = {(job.variant.key, job.seed, job.run_id) for job in jobs}
    return [result for result in read_results(path) if (result.variant, result.seed, result.run_id) in known]


def write_result(path: Path, result: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        handle.write(result.to_json() + "\n")


def jobs_of(variants: Sequence[Variant], seeds: Sequence[int], size: Size) -> list[Job]:
    store = Store()

    def job(variant: Variant, seed: int) -> Job:
        return Job(variant, seed, size, identity(recipe_of(variant, seed, size, "."), variant.idea, store))

    return [job(variant, seed) for variant in variants for seed in seeds]


def with_budget(job: Job, results: Sequence[Run]) -> Job:
    """The job with the tokens that the yardstick trained on; only presets are compared at equal tokens."""
    if job.variant.group not in SIGNALS:
        return job
    own = (job.variant.group + "/" + YARDSTICK, job.seed)
    budgets = [r.tokens[job.size.num_rounds - 1] for r in results if (r.variant, r.seed) == own and not r.stopped]
    return dataclasses.replace(job, budget=budgets[0] if budgets else None)


def do(jobs: Sequence[Job], path: Path) -> None:
    """Do what has no line in the results yet: the yardstick first, for its tokens are the others' budget."""
    first = [job for job in jobs if job.variant.name == YARDSTICK]
    rest = [job for job in jobs if job.variant.name != YARDSTICK]
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        for wave in (first, rest):
            done = current(path, jobs)
            known = {(result.variant, result.seed) for result in done}
            missing = [job for job in wave if (job.variant.key, job.seed) not in known]
            futures = [pool.submit(run, with_budget(job, done)) for job in missing]
            for count, future in enumerate(as_completed(futures), 1):
                result = future.result()
                write_result(path, result)
                end = f"stopped in {result.stopped}" if result.stopped else f"{len(result.tokens)} rounds"
                print(f"{count}/{len(missing)} {result.variant} seed {result.seed}: {end}", file=sys.stderr)


def write_docs(study: Study, docs: Path) -> None:
    """``results.md`` and its plots."""
    import study_plots  # matplotlib, which no worker needs

    (docs / "images").mkdir(parents=True, exist_ok=True)
    for name, svg in study_plots.plots(study).items():
        (docs / "images" / f"study-{name}.svg").write_text(svg, encoding="utf-8")
    (docs / "results.md").write_text(page(study), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="how many: 1, 2, ...")
    parser.add_argument("--only", choices=[*SIGNALS, "options", "longer"], help="one group; default all")
    parser.add_argument("--quick", action="store_true", help="two seeds and few updates, into .cache/study")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page from the runs that are finished")
    arguments = parser.parse_args()
    # For the workers: one thread each, and no progress lines, which would mix.
    os.environ |= {"OMP_NUM_THREADS": "1", "CAMOPD_PROGRESS": os.devnull, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    size, seeds = (QUICK, [1, 2]) if arguments.quick else (FULL, list(range(1, arguments.seeds + 1)))
    path = ROOT / ".cache" / "study" / "study.jsonl" if arguments.quick else RESULTS
    docs = path.parent if arguments.quick else ROOT / "docs"

    variants = all_variants()
    with extra_presets():
        jobs = jobs_of(variants, seeds, size)
    wanted = [job for job in jobs if arguments.only in (None, job.variant.group)]
    start, teacher = run_references(size)
    if not arguments.page:
        do(wanted, path)
    study = Study(current(path, jobs), variants, size, seeds, start=start, teacher=teacher)
    write_docs(study, docs)
    print(docs / "results.md")


if __name__ == "__main__":
    main()
