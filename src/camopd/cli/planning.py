"""`camopd plan`: what a recipe will take, before anything is started."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from camopd.cli.options import RecipeArgument, SetOption, parameters_of, place_of
from camopd.estimate.assumptions import Assumptions, Dtype, EngineName, GpuName


def plan(
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

    wanted = load_recipe(recipe, parameters_of(set_))
    again = wanted.train.activation_checkpointing if checkpointing is None else checkpointing
    given = Assumptions(
        gpu, gpu_memory, peak, bandwidth, peak_share, bandwidth_share, reserve, dtype or wanted.train.precision,
        engine, again, start_minutes, price,
    )  # fmt: skip
    lengths = LengthOptions(place_of(from_) if from_ else "", prompt_tokens, response_tokens, kept)
    found = planned(wanted, given, parameters_of(config, "--config"), lengths, Store())
    if json_:
        typer.echo(json.dumps(found.to_record(), indent=1))
    else:
        print_plan(found, Console(highlight=False, markup=False, soft_wrap=True), gpu_hours=gpu_hours)
