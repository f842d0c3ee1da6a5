"""Ideas past the paper on the micro example, each against the same baseline with the same seeds, at equal rollouts.

    python benchmarks/options.py --seeds 1 2 3 4 5 6    # benchmarks/results/options.md; what is done is not run again
    python benchmarks/options.py --only top-8 merged    # options whose name holds one of these words, and their baselines

An option is the project's own loop with one thing changed: parameters of the recipe, a rule of a preset, or a small subclass
of ``camopd.recover.Session`` in options_ideas.py. Every run samples 80 batches of 64 responses and is evaluated
half-way and at its end.
Each finished run is one line of benchmarks/results/options.jsonl; lines of other models or settings are ignored.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import options_ideas as ideas
from scipy import stats
from transformers import PreTrainedModel

from camopd import prepare
from camopd.config import Recipe, load_recipe
from camopd.evaluate import load_tokenizer
from camopd.evaluation.harness import Harness, open_tasks
from camopd.plan import Plan
from camopd.presets import presets
from camopd.recover import Session
from camopd.store import Store, digest

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
RUNS = RESULTS / "options.jsonl"
RECIPE = str(ROOT / "recipes" / "micro.toml")
SETTINGS: dict[str, Any] = {
    "method": "alternating",  # G, G, G, D without selection: every rollout counts
    "execution": "colocated",
    "num_rounds": 5,
    "steps_per_round": 16,
    "num_threads": 1,
    "rollout.prompts_per_step": 64,
    "score.empty_answers": "score",
    "train.diagnose_every": 0,
}
Row = dict[str, Any]


# --- The options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One thing changed.

    Attributes:
        name: short, unique.
        base: the option that it is compared with; its own name for a baseline.
        parameters: of the recipe, on top of the baseline's.
        session: the loop.
    """

    name: str
    base: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    session: Callable[[Plan, int, Store], Session] = Session


SAMPLED, TOPK = "sampled", "top-8"
BASES: dict[str, dict[str, Any]] = {SAMPLED: {"score.signal": "sampled"}, TOPK: {"score.signal": "topk", "score.top_k": 8}}
FOUR_ANSWERS = {"rollout.samples_per_prompt": 4, "rollout.prompts_per_step": 16}
OPTIONS = (
    Option(TOPK, TOPK),
    Option(SAMPLED, SAMPLED),
    Option("merged start 0.25", TOPK, session=partial(ideas.Merged, share=0.25)),
    Option("control variate, exact", SAMPLED, session=partial(ideas.WithRule, rule=ideas.control_variate)),
    Option("half reverse, half forward KL", TOPK, {"method": "both-ways"}),
    Option("batches of 32, 160 updates", TOPK, {"rollout.prompts_per_step": 32, "num_rounds": 10}),
    Option("gap and descent", TOPK, session=ideas.RemainingGap),
    Option("gap and descent, drift", TOPK, session=partial(ideas.RemainingGap, drift=True)),
    Option("explorers and token gate", SAMPLED, FOUR_ANSWERS, partial(ideas.Explorers, rule=ideas.gated)),
    Option("token gate", SAMPLED, session=partial(ideas.WithRule, rule=ideas.gated)),
    Option("two updates a batch", TOPK, session=ideas.TwoUpdates),
    Option("spaced review", TOPK, session=ideas.SpacedReview),
    Option("7:1", TOPK, {"branches.general.steps": 7}),
    Option("moments by branch", TOPK, session=ideas.OwnMoments),
    Option("merged start 0.5", TOPK, session=partial(ideas.Merged, share=0.5)),
    Option("pulled 0.002", TOPK, session=partial(ideas.Pulled, share=0.002)),
    Option("prompt tokens too", TOPK, session=ideas.PromptTokens),
    Option("Jensen-Shannon", TOPK, {"method": "jensen-shannon"}),
    Option("forward KL", TOPK, {"method": "forward"}),
    Option("twice the rate", TOPK, {"train.learning_rate": 4e-4}),
    Option("twice the rate, decaying", TOPK, {"train.learning_rate": 4e-4}, ideas.Decaying),
    Option("full vocabulary", TOPK, {"score.signal": "full"}),
    Option("student's top 8", TOPK, {"score.top_k_of": "student"}),
    Option("control variate, top 8", SAMPLED, session=partial(ideas.WithRule, rule=ideas.control_variate_top)),
    Option("explorers", SAMPLED, FOUR_ANSWERS, partial(ideas.Explorers, rule=ideas.plain)),
    Option("selection (camopd)", TOPK, {"method": "camopd"}),
    Option("merged 0.25, no training", TOPK, session=partial(ideas.MergeOnly, share=0.25)),
    Option("merged 0.5, no training", TOPK, session=partial(ideas.MergeOnly, share=0.5)),
)


# --- Runs -----------------------------------------------------------------------------------------------------------------


def recipe_of(option: Option, seed: int, output: str, store: Store) -> Recipe:
    values = {**SETTINGS, **BASES[option.base], **option.parameters, "seed": seed, "output": output}
    return load_recipe(RECIPE, values, store=store)


def key_of(option: Option, recipe: Recipe, content_ids: Mapping[str, str]) -> str:
    """What makes a run what it is: settings, models and prompts, not places."""
    settings = recipe.model_dump(mode="json", include={"method", "mixing", "seed", "num_rounds", "rollout", "score", "train"})
    steps = {branch.name: branch.steps for branch in recipe.branches}
    return digest([option.name, settings, steps, dict(content_ids)])


@contextmanager
def judge(plan: Plan, store: Store) -> Iterator[Callable[[PreTrainedModel], dict[str, float]]]:
    """A function from a model to its scores by task and branch (the mean of the branch's tasks)."""
    branches = plan.recipe.branches
    names = [task for branch in branches for task in branch.tasks]
    assert plan.recipe.evaluate.task_dir is not None
    with open_tasks(names, store.fetch(plan.recipe.evaluate.task_dir), seed=0) as tasks:
        harness = Harness(tasks=tasks, tokenizer=load_tokenizer(plan, store), batch_size=plan.recipe.evaluate.batch_size)

        def scores(model: PreTrainedModel) -> dict[str, float]:
            found = {name: statistics.mean(a.score for a in answers) for name, answers in harness.evaluate(model)}
            return found | {branch.name: statistics.mean(found[task] for task in branch.tasks) for branch in branches}

        yield scores


def run(option: Option, plan: Plan, scores: Callable[[PreTrainedModel], dict[str, float]], store: Store) -> Row:
    """Train, and evaluate half-way and at the end; numbers of the run."""
    seconds, reviews = 0.0, 0
    found: dict[str, float] = {}
    session = option.session(plan, 1, store)
    for when in ("half", "end"):
        worked = time.process_time()
        records = [session.step()[1] for _ in range(plan.num_steps // 2)]
        seconds += time.process_time() - worked
        reviews += sum("domain" in record.get("branches", ()) for record in records)
        found |= {f"{when}/{name}": score for name, score in scores(session.trainer.model).items()}
    return {**found, "reviews": reviews, "cpu_seconds": seconds}


def finished(path: Path) -> dict[str, Row]:
    """Runs by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def run_missing(options: Sequence[Option], seeds: Sequence[int], store: Store) -> dict[tuple[str, int], Row]:
    """Every option with every seed, seed by seed; what is on file is read. By option and seed."""
    found: dict[tuple[str, int], Row] = {}
    with tempfile.TemporaryDirectory(prefix="camopd-options-") as output:
        plan = prepare.run(recipe_of(OPTIONS[0], seeds[0], output, store), store=store)
        done = finished(RUNS)
        with judge(plan, store) as scores, RUNS.open("a", encoding="utf-8") as file:
            for seed in seeds:
                for option in options:
                    recipe = recipe_of(option, seed, output, store)
                    key = key_of(option, recipe, plan.content_ids)
                    if key not in done:
                        numbers = run(option, replace(plan, recipe=recipe), scores, store)
                        done[key] = {"option": option.name, "seed": seed, **numbers, "key": key}
                        print(json.dumps(done[key]), file=file, flush=True)
                        print(f"{option.name}, seed {seed}: {numbers['end/general']:.3f}, {numbers['end/domain']:.3f}")
                    found[option.name, seed] = done[key]
    return found


# --- The table ------------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % t-interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def family(base: str, options: Sequence[Option], runs: Mapping[tuple[str, int], Row]) -> str:
    """The baseline and its options, the largest gain first."""

    def values(option: Option, name: str) -> list[float]:
        return [row[name] for (found, _), row in sorted(runs.items()) if found == option.name]

    def gains(option: Option, name: str) -> list[float]:
        pairs = [(row[name], runs[base, seed][name]) for (found, seed), row in sorted(runs.items()) if found == option.name]
        return [own - other for own, other in pairs]

    rows = []
    own = [option for option in options if option.base == base]
    for option in sorted(own, key=lambda o: (o.name != base, -statistics.mean(gains(o, "end/general")))):
        better = f"{sum(gain > 0 for gain in gains(option, 'end/general'))} of {len(gains(option, 'end/general'))}"
        compared = [*(interval(gains(option, name)) for name in COMPARED), better]
        means = [f"{statistics.mean(values(option, name)):.3f}" for name in SHOWN]
        rest = [f"{statistics.mean(values(option, 'reviews')):.0f}", f"{statistics.median(values(option, 'cpu_seconds')):.0f}"]
        rows.append([option.name, *means, *([""] * len(compared) if option.name == base else compared), *rest])
    return table(HEADER, rows)


SHOWN = ("half/general", "half/domain", "end/micro_seen", "end/micro_unseen", "end/general", "end/domain")
COMPARED = ("half/general", "end/general", "end/domain")
HEADER = (
    *("option", "general, half-way", "domain, half-way", "seen", "unseen", "general", "domain"),
    *("difference: general, half-way", "general", "domain", "general better", "reviews", "CPU s"),
)


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lm-eval"))
    return f"{platform.machine()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}, {packages}"


def write_report(options: Sequence[Option], seeds: Sequence[int], runs: Mapping[tuple[str, int], Row]) -> None:
    parts = [
        "# Ideas past the paper, on the micro example",
        f"`python benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`, {machine()}.",
        f"Seeds {', '.join(map(str, seeds))}. Every run samples 5,120 responses: 80 batches of 64 unless the option says "
        "otherwise, in the order G, G, G, D without selection. Differences are paired by seed, with 95 % t-intervals. "
        "Half-way is after 40 batches. `reviews` are the updates on domain prompts, `CPU s` the median processor seconds of "
        "training, evaluation left out.",
    ]
    for base in BASES:
        parts += [f"## Against `{base}`", family(base, options, runs)]
    text = "\n\n".join(parts) + "\n"
    (RESULTS / "options.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--only", nargs="+", default=[""], help="words in the names of options")
    arguments = parser.parse_args()
    presets().update(ideas.EXTRA_PRESETS)  # type: ignore[attr-defined]  # found by name like those of the package
    asked = [option for option in OPTIONS if any(word in option.name for word in arguments.only)]
    options = [option for option in OPTIONS if option in asked or option.name in {found.base for found in asked}]
    write_report(options, arguments.seeds, run_missing(options, arguments.seeds, Store()))


if __name__ == "__main__":
    main()
