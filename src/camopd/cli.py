"""`camopd <verb>`: the seven stages one by one, and the whole. Imports nothing heavy: help must answer at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from camopd import __version__
from camopd.attempts import heeding_sigterm
from camopd.errors import CamopdError
from camopd.estimate.assumptions import Assumptions, Dtype, EngineName, GpuName

if TYPE_CHECKING:
    from camopd.workflow import Done

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Give a domain language model its lost general ability back, and keep the domain (CaMOPD).",
)

RecipeArgument = Annotated[
    str, typer.Argument(help="Recipe: a TOML file, an s3:// URI of one, or a shipped name such as micro.")
]
RoundArgument = Annotated[str, typer.Argument(help="Prefix of the round, `<run>/rounds/0001`: a local folder or s3://.")]
RunArgument = Annotated[str, typer.Argument(help="Prefix of the run, as printed by prepare: a local folder or s3://.")]
SetOption = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting, e.g. -s train.learning_rate=1e-5.")
]


def _parameters(assignments: list[str], option: str = "--set") -> dict[str, str]:
    pairs = [assignment.partition("=") for assignment in assignments]
    wrong = [key for key, sign, _ in pairs if not sign]
    if wrong:
        raise typer.BadParameter(f"write KEY=VALUE, not {wrong[0]!r}", param_hint=option)
    return {key: value for key, _, value in pairs}


def _place(text: str) -> str:
    """A location as typed in a shell: a relative folder is relative to here."""
    from camopd.store import check_uri

    try:
        return check_uri(text if "://" in text else str(Path(text).absolute()))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _say(done: Done) -> None:
    for name, value in done.metrics.items():
        typer.echo(f"  {name:<32} {value:,.6g}")
    typer.echo(done.uri)


@app.command()
def prepare(recipe: RecipeArgument, set_: SetOption = []) -> None:  # noqa: B006 (typer copies it)
    """Check every input, give each its content id, tokenise the prompts and write the plan.

    **Reads** the recipe, both models' headers and tokenizers, the prompt files, the evaluation tasks.
    **Writes** `<output>/<name>-<id>/`: `recipe.json` and `plan/`. Prints the run's prefix. No GPU, no weights loaded.

    Example: `camopd prepare recipes/micro.toml`
    """
    from camopd import workflow

    done = workflow.prepare(recipe, _parameters(set_))
    _say(done)


@app.command()
def rollout(round_uri: RoundArgument) -> None:
    """Sample the student's answers to the round's prompts.

    **Reads** `plan/` and the checkpoint of the round before. **Writes** `rollout/rollouts.parquet`.

    Example: `camopd rollout runs/micro-0123456789ab/rounds/0001`
    """
    from camopd import workflow

    _say(workflow.rollout(_place(round_uri)))


@app.command()
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

    place = _place(round_uri)
    run_uri, number = run_and_round(place)
    names = [branch] if branch else [b.name for b in Plan.load(Store(), run_uri).active_branches(number)]
    for name in names:
        _say(workflow.score(score_uri(place, name)))


@app.command()
def select(round_uri: RoundArgument) -> None:
    """Keep the samples that hold most of the teacher-student gap.

    **Reads** `rollout/` and every `score-<branch>/`. **Writes** `select/selection.parquet` and `summary.json`.

    Example: `camopd select runs/micro-0123456789ab/rounds/0001`
    """
    from camopd import workflow

    _say(workflow.select(_place(round_uri)))


@app.command()
def train(round_uri: RoundArgument) -> None:
    """Update the student on the selected samples, in the schedule's order.

    **Reads** the round's other prefixes and the checkpoint before. **Writes** `train/`: a model folder, trainer state,
    `steps.json`.

    Example: `camopd train runs/micro-0123456789ab/rounds/0001`
    """
    from camopd import workflow

    _say(workflow.train(_place(round_uri)))


@app.command()
def evaluate(run_uri: RunArgument) -> None:
    """Evaluate teacher, before and after with the same settings; decide at the gate; write the report.

    **Reads** the models, the last checkpoint and the tasks. **Writes** `evaluation/<id>/`: `evaluation.json`,
    `samples.parquet`, `report.html`.

    Example: `camopd evaluate runs/micro-0123456789ab`
    """
    from camopd import workflow

    _say(workflow.evaluate(_place(run_uri)))


@app.command()
def promote(run_uri: RunArgument) -> None:
    """Register the recovered model in MLflow and move the alias, if the gate said yes.

    **Reads** `evaluation/<id>/` and the last checkpoint, every file of which is verified. **Writes**
    `release/<id>/release.json` and a registry version that points at the weights where they are.

    Example: `camopd promote runs/micro-0123456789ab`
    """
    from camopd import workflow

    typer.echo(workflow.promote(_place(run_uri)).document)


@app.command()
def run(recipe: RecipeArgument, set_: SetOption = []) -> None:  # noqa: B006 (typer copies it)
    """Recover a model: all seven stages in this process. Started again after a stop or a kill, it goes on.

    **Reads** what the recipe names. **Writes** everything under `<output>/<name>-<id>/`.

    Example: `camopd run recipes/micro.toml -s seed=2`
    """
    from camopd import workflow

    _show(workflow.run(recipe, _parameters(set_)).uri)


@app.command()
def recover(recipe: RecipeArgument, set_: SetOption = []) -> None:  # noqa: B006 (typer copies it)
    """Recover a model with everything in memory and a fresh batch for every update: the exact algorithm of the paper.

    For one machine: no tables are written between sampling and update. Checkpoints, resume, evaluation and promotion are as in
    `camopd run`. **Writes** under `<output>/<name>-<id>/`; the id differs from that of a run by stages.

    Example: `camopd recover recipes/micro.toml -s method=mopd`
    """
    from camopd import workflow

    _show(workflow.run(recipe, {**_parameters(set_), "execution": "colocated"}).uri)


@app.command(name="plan")
def plan_(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006 (typer copies it)
    config: Annotated[
        list[str], typer.Option(metavar="MODEL=PATH", help="config.json of `student` or of a branch's teacher: file or folder.")
    ] = [],  # noqa: B006
    prompt_tokens: Annotated[
        list[str], typer.Option(metavar="[BRANCH=]N", help="Mean prompt; else an eighth of the recipe's limit.")
    ] = [],  # noqa: B006
    response_tokens: Annotated[
        list[str], typer.Option(metavar="[BRANCH=]N", help="Mean response; else an eighth of the recipe's limit.")
    ] = [],  # noqa: B006
    kept: Annotated[
        list[str], typer.Option(metavar="[BRANCH=]SHARE", help="Samples trained on; else the most that selection can keep.")
    ] = [],  # noqa: B006
    from_: Annotated[str, typer.Option("--from", metavar="RUN_URI", help="A run whose finished rounds tell the lengths.")] = "",
    gpu: Annotated[GpuName, typer.Option(help="Card.")] = Assumptions.gpu,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="GB of one GPU; else the card's.")] = None,
    peak: Annotated[float | None, typer.Option(min=1, help="TFLOP/s of one GPU; else the card's.")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0.01, help="TB/s of one GPU's memory; else the card's.")] = None,
    peak_share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the peak that is reached.")
    ] = Assumptions.peak_share,
    bandwidth_share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the bandwidth in decoding.")
    ] = Assumptions.bandwidth_share,
    reserve: Annotated[float, typer.Option(min=0, max=0.9, help="Share of GPU memory that stays free.")] = Assumptions.reserve,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the computation; else the recipe's train.precision.")] = None,
    engine: Annotated[EngineName | None, typer.Option(help="What samples; else the recipe's.")] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="Activation checkpointing in training; else the recipe's.")] = None,
    start_minutes: Annotated[float, typer.Option(min=0, help="Minutes until a GPU pod computes.")] = Assumptions.start_minutes,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a GPU-hour.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(min=0, help="Known GPU-hours: which share of peak explains them?")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recipe will take before anything is started: GPU memory, GPUs, tokens, hours, bytes, pods, cost.

    **Reads** the recipe and the models' config.json: no weights, no GPU, no network. **Writes** nothing.
    docs/scale.md says what to turn.

    Example: `camopd plan recipes/medical-8b.toml --price 2.5`
    """
    from rich.console import Console

    from camopd.config import load_recipe
    from camopd.estimate.show import planned, print_plan
    from camopd.estimate.sources import LengthOptions
    from camopd.store import Store

    wanted = load_recipe(recipe, _parameters(set_))
    again = wanted.train.activation_checkpointing if checkpointing is None else checkpointing
    given = Assumptions(
        gpu, gpu_memory, peak, bandwidth, peak_share, bandwidth_share, reserve, dtype or wanted.train.precision,
        engine, again, start_minutes, price,
    )  # fmt: skip
    lengths = LengthOptions(_place(from_) if from_ else "", prompt_tokens, response_tokens, kept)
    found = planned(wanted, given, _parameters(config, "--config"), lengths, Store())
    if json_:
        typer.echo(json.dumps(found.to_record(), indent=1))
    else:
        print_plan(found, Console(highlight=False, markup=False, soft_wrap=True), gpu_hours=gpu_hours)


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
    print_result(result, plan, Console(highlight=False, markup=False, soft_wrap=True))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point: an error meant for people is one message and exit code 1; anything else is a bug with its traceback."""
    try:
        with heeding_sigterm(at_once=True):
            app()
    except CamopdError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
