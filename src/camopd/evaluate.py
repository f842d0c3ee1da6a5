"""Stage 6: the general teacher, the domain model and the recovered model on the same samples, and the gate's decision.

Which models, which arithmetic, what is written. The harness itself is behind ``harness.py``, the resampling in
``intervals.py``, the decision in ``gate.py``, the page in ``report.py``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camopd import plan as layout
from camopd.errors import InputError, Problem, UnhealthyRunError
from camopd.gate import decide
from camopd.ledger import Line, Part, ledger, parts_of
from camopd.past import known, require_files
from camopd.plan import Plan
from camopd.progress import Progress
from camopd.recipe.served import is_served
from camopd.records import write_table
from camopd.rounds import stop_reason
from camopd.runtime import accelerators, set_threads
from camopd.store import Manifest, Store, digest, join

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from camopd.evaluation.harness import Answer
    from camopd.evaluation.intervals import Estimate, Interval
    from camopd.evaluation.served import ServedTeacher

EVALUATION = "evaluation.json"
SAMPLES = "samples.parquet"
REPORT = "report.html"
BEFORE, AFTER = "before", "after"

Answers = dict[str, dict[str, list["Answer"]]]  # model -> task -> answers, in the order of the samples
Estimates = dict[str, dict[str, "Estimate"]]  # model -> task or branch -> estimate


# --- Which models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """A model to evaluate.

    Attributes:
        key: ``before``, ``after``, ``teacher-<branch>`` or ``round-0004``.
        label: the same for people.
        uri: its folder.
        content_id: its identity.
        round: updates behind it, in rounds; None for a teacher.
    """

    key: str
    label: str
    uri: str
    content_id: str
    round: int | None = None


def curve_rounds(num_rounds: int, points: int) -> list[int]:
    """Up to ``points`` rounds strictly between 0 (before) and ``num_rounds`` (after), evenly spread."""
    spread = {round(i * num_rounds / (points + 1)) for i in range(1, points + 1)}
    return sorted(spread - {0, num_rounds})


def contestants(plan: Plan, store: Store) -> list[Contestant]:
    """Before, after, each teacher that is another model, and some rounds in between; each model once.

    Of a run that `camopd gc` has been to, a finished evaluation is still the one of all these models; a new one does without
    the rounds in between that are gone.

    Raises:
        UnhealthyRunError: the run stopped itself, so there is no last checkpoint.
        StoreError: the last round has not been trained.
    """
    last = plan.recipe.num_rounds
    if known(plan.student_uri(last + 1), store) is None:
        reason = stop_reason(plan.run_uri, store=store)
        if reason is not None:
            raise UnhealthyRunError(f"there is no last checkpoint to evaluate: the run stopped itself in {reason}")

    def checkpoint(key: str, label: str, number: int) -> Contestant:
        uri = plan.student_uri(number + 1)
        return Contestant(key, label, uri, (known(uri, store) or store.require(uri)).content_id, number)

    found = [
        Contestant(BEFORE, "domain model before", plan.recipe.student, plan.content_ids["student"], 0),
        checkpoint(AFTER, "recovered model after", last),
    ]
    for branch in plan.recipe.branches:
        teacher = plan.content_ids[f"teacher/{branch.name}"]
        if teacher not in [known.content_id for known in found]:
            key, label = f"teacher-{branch.name}", f"{branch.name} teacher"
            found.append(Contestant(key, label, plan.teacher_uri(branch), teacher))
    between = [
        checkpoint(f"round-{n:04d}", f"after round {n}", n) for n in curve_rounds(last, plan.recipe.evaluate.curve_points)
    ]
    left = [model for model in between if store.manifest(model.uri) is not None]
    if len(left) < len(between) and store.manifest(_place(plan, *_identity(plan, [*found, *between], store))) is None:
        between = left
    return found + between


def teachers(plan: Plan, models: Iterable[Contestant]) -> dict[str, str]:
    """Branch -> key of the evaluated model that teaches it; ``before`` where the frozen student does."""
    keys = {model.content_id: model.key for model in reversed(list(models))}
    return {branch.name: keys[plan.content_ids[f"teacher/{branch.name}"]] for branch in plan.recipe.branches}


# --- Where it lies --------------------------------------------------------------------------------------------------------


def _identity(plan: Plan, models: Iterable[Contestant], store: Store) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings and the content ids that make an evaluation what it is."""
    recipe = plan.recipe
    config = {
        "evaluate": recipe.evaluate.model_dump(mode="json", exclude={"task_dir"}),
        "gate": recipe.gate.model_dump(mode="json"),
        "branches": [branch.model_dump(mode="json", include={"name", "role", "tasks"}) for branch in recipe.branches],
    }
    inputs = {model.key: model.content_id for model in models}
    if recipe.evaluate.task_dir is not None:
        inputs["tasks"] = store.content_id(recipe.evaluate.task_dir)
    return config, inputs


def _place(plan: Plan, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    return join(plan.run_uri, "evaluation", digest([config, inputs]).removeprefix("sha256:")[:8])


def evaluation_uri(plan: Plan, store: Store) -> str:
    """Prefix of the evaluation that belongs to the recipe's evaluation settings, tasks, gate and last checkpoint.

    Raises StoreError or UnhealthyRunError when there is no last checkpoint.
    """
    return _place(plan, *_identity(plan, contestants(plan, store), store))


# --- Arithmetic (pure) ----------------------------------------------------------------------------------------------------


def estimate(answers: Answers, plan: Plan) -> tuple[Estimates, Estimates]:
    """Scores by model and task, and by model and branch: the mean of the branch's task means; all on the same resamples."""
    import numpy as np

    from camopd.evaluation.intervals import bootstrap, mean

    by_task: Estimates = {model: {} for model in answers}
    for task, reference in answers[BEFORE].items():
        items = [answer.item for answer in reference]
        assert all([answer.item for answer in tasks[task]] == items for tasks in answers.values()), "samples are not paired"
        scores = {model: np.array([answer.score for answer in tasks[task]]) for model, tasks in answers.items()}
        resamples = plan.recipe.evaluate.bootstrap
        for model, result in bootstrap(scores, num_resamples=resamples, seed=plan.recipe.seed, task=task).items():
            by_task[model][task] = result
    by_branch = {
        model: {branch.name: mean(tasks[name] for name in branch.tasks) for branch in plan.recipe.branches}
        for model, tasks in by_task.items()
    }
    return by_task, by_branch


def shares(by_branch: Estimates, teacher: Mapping[str, str], plan: Plan) -> dict[str, dict[str, Estimate]]:
    """Recovered share of each branch to recover and retained share of each branch to retain (method section 7)."""
    found: dict[str, dict[str, Estimate]] = {"recover": {}, "retain": {}}
    for branch in plan.recipe.branches:
        before, after, taught = (by_branch[model][branch.name] for model in (BEFORE, AFTER, teacher[branch.name]))
        share = (after - before) / (taught - before) if branch.role == "recover" else after / taught
        found[branch.role][branch.name] = share
    return found


def not_negative(share: Interval) -> Interval:
    """A retained share's interval without what no share can be; an end that the data cannot bound stays without bound."""
    return replace(share, low=max(share.low, 0.0)) if math.isfinite(share.low) else share


def within_scale(score: Interval) -> Interval:
    """A score's interval without what no score can be: below 0, or above 1 where the score is a share."""
    if not 0 <= score.value <= 1:
        return score
    return replace(score, low=max(score.low, 0.0), high=min(score.high, 1.0))


def summarise(answers: Answers, models: list[Contestant], plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an evaluation, ready for JSON (docs/data.md): scores, shares, differences, curve, decision, headline."""
    by_task, by_branch = estimate(answers, plan)
    teacher = teachers(plan, models)
    found = {
        role: {name: share.interval() for name, share in each.items()}
        for role, each in shares(by_branch, teacher, plan).items()
    }
    found["retain"] = {name: not_negative(share) for name, share in found["retain"].items()}
    decision = decide(found["recover"], found["retain"], plan.recipe.gate)

    def gain(table: Estimates) -> dict[str, Any]:
        return {name: (after - table[BEFORE][name]).interval().to_json() for name, after in table[AFTER].items()}

    def scored(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: within_scale(value.interval()).to_json() for name, value in estimates.items()}

    scores = {key: {"branches": scored(by_branch[key]), "tasks": scored(by_task[key])} for key in answers}
    steps = sorted((model for model in models if model.round is not None), key=lambda model: model.round or 0)
    evaluation = {
        "models": {model.key: asdict(model) for model in models},
        "branches": [
            {"name": b.name, "role": b.role, "tasks": list(b.tasks), "teacher": teacher[b.name]} for b in plan.recipe.branches
        ],
        "scores": scores,
        "gain": {"branches": gain(by_branch), "tasks": gain(by_task)},
        "recovered": {name: share.to_json() for name, share in found["recover"].items()},
        "retained": {name: share.to_json() for name, share in found["retain"].items()},
        "decision": asdict(decision),
        "curve": [{"round": model.round, "branches": scores[model.key]["branches"]} for model in steps],
        "settings": dict(settings),
    }
    return evaluation | {"headline": headline(evaluation)}


def sample_rows(answers: Answers) -> list[dict[str, Any]]:
    """The rows of ``samples.parquet``: one a model and sample."""
    return [
        {"model": model, "task": task, **asdict(answer)}
        for model, tasks in answers.items()
        for task, given in tasks.items()
        for answer in given
    ]


def headline(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers for trackers and the pipeline's metrics; what is undefined is left out."""
    numbers: dict[str, float | None] = {"passed": float(evaluation["decision"]["passed"])}
    for branch in evaluation["branches"]:
        name = branch["name"]
        for label, model in (("teacher", branch["teacher"]), (BEFORE, BEFORE), (AFTER, AFTER)):
            numbers[f"{name}_{label}"] = evaluation["scores"][model]["branches"][name]["value"]
    for kind in ("recovered", "retained"):
        for name, share in evaluation[kind].items():
            numbers |= {
                f"{kind}_{name}": share["value"],
                f"{kind}_{name}_low": share["low"],
                f"{kind}_{name}_high": share["high"],
            }
    return {name: number for name, number in numbers.items() if number is not None}


def headline_table(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """The result as rows of text, the first one the header: a column a branch, each number with its 95 % interval."""
    names = [branch["name"] for branch in evaluation["branches"]]
    others = [key for key, model in evaluation["models"].items() if model["round"] is None]
    rows = [["", *names]]
    for key in (*others, BEFORE, AFTER):
        score = evaluation["scores"][key]["branches"]
        rows.append([evaluation["models"][key]["label"], *(format_interval(score[name]) for name in names)])
    for kind in ("recovered", "retained"):
        share = evaluation[kind]
        if share:
            rows.append([f"{kind} share", *(format_interval(share[name]) if name in share else "" for name in names)])
    return rows


def format_interval(interval: Mapping[str, float | None]) -> str:
    """``0.720 (0.641 to 0.790)``; ``n/a`` for a number or an end that is undefined."""
    value, low, high = ("n/a" if interval[name] is None else f"{interval[name]:.3f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


# --- The stage ------------------------------------------------------------------------------------------------------------


def load_tokenizer(plan: Plan, store: Store) -> PreTrainedTokenizerBase:
    """The student's tokenizer with the chat template that the plan froze: one for all models, so all read the same tokens."""
    from transformers import AutoTokenizer

    folder = store.fetch(plan.tokenizer_uri(plan.recipe.student, store))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    template = join(layout.plan_uri(plan.run_uri), layout.TEMPLATE)
    tokenizer.chat_template = store.read(template).decode() if store.stat(template) else None
    return tokenizer


def served_teacher(plan: Plan, uri: str, store: Store) -> ServedTeacher:
    """A teacher that answers from its server; its head and layers are no concern of the evaluation's."""
    from transformers import AutoConfig

    from camopd.evaluation.served import ServedTeacher
    from camopd.rollout import connect_teacher

    base = store.fetch(plan.weights(plan.recipe.student, store).base)
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    return ServedTeacher(connect_teacher(plan, uri), config, plan.eos_ids)


def answer_all(plan: Plan, models: list[Contestant], store: Store) -> tuple[Answers, dict[str, Any]]:
    """Every model's answers to every task, under the same settings; and those settings."""
    from camopd.evaluation.harness import Harness, open_tasks, quiet
    from camopd.lora import load_weights

    def load(uri: str) -> PreTrainedModel | ServedTeacher:
        with quiet():
            return served_teacher(plan, uri, store) if is_served(uri) else load_weights(plan.weights(uri, store), store)

    recipe, chosen = plan.recipe, plan.recipe.evaluate
    names = [task for branch in recipe.branches for task in branch.tasks]
    answers: Answers = {}
    with open_tasks(names, store.fetch(chosen.task_dir) if chosen.task_dir else None, seed=recipe.seed) as tasks:
        harness = Harness(
            tasks=tasks,
            tokenizer=load_tokenizer(plan, store),
            batch_size=chosen.batch_size,
            limit=chosen.limit,
            seed=recipe.seed,
            enable_thinking=recipe.prompts.enable_thinking,
        )
        progress = Progress("evaluate", total=len(models) * harness.num_samples(), unit="samples")
        for model in models:
            answers[model.key] = {}
            for task, given in harness.evaluate(load(model.uri)):  # no name for the model: one is in memory at a time
                answers[model.key][task] = given
                progress.advance(len(given), branch=model.label)
        return answers, harness.settings()


def _books(plan: Plan, store: Store, seconds: float) -> list[Line]:
    """What the run has taken until now, and this evaluation so far, which has no manifest yet; nothing where some is gone."""
    so_far = Manifest("evaluate", "", (), seconds=seconds, resources=accelerators("evaluate"))
    parts = parts_of(plan, store)
    return ledger([*parts, Part("evaluate", so_far)]) if parts is not None else []


def run(run_uri: str, *, store: Store | None = None) -> Manifest:
    """Evaluate a trained run: ``evaluation.json``, ``samples.parquet`` and ``report.html`` under ``evaluation/<id>/``.

    Args:
        run_uri: the run's prefix, trained to its last round.
        store: where to read and write.

    Raises:
        InputError: a branch without tasks, or a task that does not exist.
        StoreError, UnhealthyRunError: there is no last checkpoint.
    """
    store = store or Store()
    plan = Plan.load(store, run_uri)
    without = [branch.name for branch in plan.recipe.branches if not branch.tasks]
    if without:
        fix = "name at least one task of evaluate.task_dir or of lm-eval"
        raise InputError(
            [Problem(f"branches.{name}.tasks", "is empty, so nothing measures the branch", fix) for name in without]
        )
    models = contestants(plan, store)
    config, inputs = _identity(plan, models, store)
    if store.manifest(_place(plan, config, inputs)) is None:
        require_files(plan.student_uri(plan.recipe.num_rounds + 1), store)

    def write(folder: Path) -> dict[str, float]:
        from camopd.evaluation import report

        begun = time.monotonic()
        set_threads(plan.recipe.num_threads)
        answers, harness = answer_all(plan, models, store)
        settings = harness | {"seed": plan.recipe.seed, "evaluate": config["evaluate"], "gate": config["gate"]}
        evaluation = summarise(answers, models, plan, settings)
        rows = sample_rows(answers)
        write_table(folder / SAMPLES, "samples", rows)
        record = json.dumps(evaluation, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (folder / EVALUATION).write_text(record + "\n", encoding="utf-8")
        rounds = report.read_rounds(plan, store)
        page = report.render(evaluation, plan, rounds, rows, books=_books(plan, store, time.monotonic() - begun))
        (folder / REPORT).write_text(page, encoding="utf-8")
        return evaluation["headline"]

    return store.produce(_place(plan, config, inputs), stage="evaluate", config=config, inputs=inputs, write=write)
