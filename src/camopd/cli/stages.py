"""The seven stages one by one, and the whole in one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from camopd.cli.options import RecipeArgument, RoundArgument, RunArgument, SetOption, parameters_of, place_of

if TYPE_CHECKING:
    from camopd.workflow import Done


def _say(done: Done) -> None:
    for name, value in done.metrics.items():
        typer.echo(f"  {name:<32} {value:,.6g}")
    typer.echo(done.uri)


def prepare(recipe: RecipeArgument, set_: SetOption = []) -> None:  # noqa: B006 (typer copies it)
    """Check every input, give each its content id, tokenise the prompts and write the plan.

    **Reads** the recipe, both models' headers and tokenizers, the prompt files, the evaluation tasks.
    **Writes** `<output>/<name>-<id>/`: `recipe.json` and `plan/`. Prints the run's prefix. No GPU, no weights loaded.

    Example: `camopd prepare recipes/micro.toml`
    """
    from camopd import workflow

    done = workflow.prepare(recipe, parameters_of(set_))
    _say(done)


def rollout(round_uri: RoundArgument) -> None:
    """Sample the student's answers to the round's prompts.

    **Reads** `plan/` and the checkpoint of the round before. **Writes** `rollout/rollouts.parquet`.

    Example: `camopd rollout runs/micro-0123456789ab/rounds/0001`
    """
    from camopd import workflow

    _say(workflow.rollout(place_of(round_uri)))


def score(
    round_uri: RoundArgument,
    branch: Annotated[str, typer.Option("--branch", "-b", help="Branch whose teacher scores; none means every branch.")] = "",
) -> None:
    """Let the teachers say how likely the student's tokens are.

    **Reads** `rollout/` and a teacher. **Writes** `score-<branch>/scored.parquet`.

    Example: `camopd score runs/micro-0123456789ab/rounds/0001 --branch general`
    """
    from camopd import workflow
    from camopd.plan import Plan, run_and_round, score_uri
    from camopd.store import Store

    place = place_of(round_uri)
    run_uri, number = run_and_round(place)
    names = [branch] if branch else [b.name for b in Plan.load(Store(), run_uri).active_branches(number)]
    for name in names:
        _say(workflow.score(score_uri(place, name)))


def select(round_uri: RoundArgument) -> None:
    """Keep the samples that hold most of the teacher-student gap.

    **Reads** `rollout/` and every `score-<branch>/`. **Writes** `select/selection.parquet` and `summary.json`.

    Example: `camopd select runs/micro-0123456789ab/rounds/0001`
    """
    from camopd import workflow

    _say(workflow.select(place_of(round_uri)))


def train(round_uri: RoundArgument) -> None:
    """Update the student on the selected samples, in the schedule's order.

    **Reads** the round's other prefixes and the checkpoint before. **Writes** `train/`: a model folder, trainer state,
    `steps.json`.

    Example: `camopd train runs/micro-0123456789ab/rounds/0001`
    """
    from camopd import workflow

    _say(workflow.train(place_of(round_uri)))


def evaluate(run_uri: RunArgument) -> None:
    """Evaluate teacher, before and after with the same settings; decide at the gate; write the report.

    **Reads** the models, the last checkpoint and the tasks. **Writes** `evaluation/<id>/`: `evaluation.json`,
    `samples.parquet`, `report.html`.

    Example: `camopd evaluate runs/micro-0123456789ab`
    """
    from camopd import workflow

    _say(workflow.evaluate(place_of(run_uri)))


def promote(run_uri: RunArgument) -> None:
    """Register the recovered model in MLflow and move the alias, if the gate said yes and the recipe's policy allows.

    **Reads** `evaluation/<id>/` and the last checkpoint. **Writes** `release/<id>/model/`, every file of which is verified,
    a registry version that points to it, and `release/<id>/release.json`.

    Example: `camopd promote runs/micro-0123456789ab`
    """
    from camopd import workflow

    typer.echo(workflow.promote(place_of(run_uri)).document)


def run(recipe: RecipeArgument, set_: SetOption = []) -> None:  # noqa: B006 (typer copies it)
    """Recover a model: all seven stages in this process. Started again after a stop or a kill, it goes on.

    **Reads** what the recipe names. **Writes** everything under `<output>/<name>-<id>/`.

    Example: `camopd run recipes/micro.toml -s seed=2`
    """
    from camopd import workflow

    _show(workflow.run(recipe, parameters_of(set_)).uri)


def recover(recipe: RecipeArgument, set_: SetOption = []) -> None:  # noqa: B006 (typer copies it)
    """Recover a model with everything in memory and a fresh batch for every update: the exact algorithm of the paper.

    For one machine: no tables are written between sampling and update. Checkpoints, resume, evaluation and promotion are as in
    `camopd run`. **Writes** under `<output>/<name>-<id>/`; the id differs from that of a run by stages.

    Example: `camopd recover recipes/micro.toml -s method=mopd`
    """
    from camopd import workflow

    _show(workflow.run(recipe, {**parameters_of(set_), "execution": "colocated"}).uri)


def _show(run_uri: str) -> None:
    """What a finished run has come to."""
    from rich.console import Console

    from camopd.outcome import print_result, result_of
    from camopd.plan import Plan
    from camopd.store import Store

    store = Store()
    plan = Plan.load(store, run_uri)
    result = result_of(plan, store)
    assert result is not None, "every stage is done, so there is a result"
    print_result(result, plan, Console(highlight=False, markup=False, soft_wrap=True), store)
