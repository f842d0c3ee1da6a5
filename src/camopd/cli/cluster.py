"""`camopd submit` and `camopd watch`: a recovery on the cluster."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from camopd.cli.options import RecipeArgument, SetOption, parameters_of

if TYPE_CHECKING:
    from camopd.kubeflow.client import Connection

HostOption = Annotated[str, typer.Option(help="Address of the KFP API or UI; else KFP_HOST, else kfp's own ways.")]
NamespaceOption = Annotated[str, typer.Option(help="Namespace of experiment and run, where Kubeflow has many users.")]


class Preflight(StrEnum):
    """How much is checked from here before a run is submitted."""

    full = "full"
    recipe = "recipe"


def submit(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006 (typer copies it)
    pipeline: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A pipeline on the server, its newest version; or a compiled file.")
    ] = "camopd-recovery",
    pools: Annotated[Path | None, typer.Option(help="Pools file: compile the pipeline for it, and upload that.")] = None,
    experiment: Annotated[str, typer.Option(help="Experiment of the run; made where it is not there.")] = "camopd",
    namespace: NamespaceOption = "",
    service_account: Annotated[str, typer.Option(help="Service account of the run's pods.")] = "",
    run_name: Annotated[str, typer.Option(help="Name of the run; else the recipe's and the time.")] = "",
    watch_: Annotated[bool, typer.Option("--watch/--no-watch", help="Follow the run to its end.")] = True,
    preflight: Annotated[
        Preflight, typer.Option(help="full: check the inputs from here, too; recipe: leave them to the run's first step.")
    ] = Preflight.full,
    host: HostOption = "",
) -> None:
    """Check a recipe, start it on Kubeflow Pipelines, and follow it.

    The recipe travels as text: what was checked is what runs. Values of `-s` go into the run form where it has a field for
    them, else into that text. **Reads** what `prepare` reads. **Writes** a pipeline version, where the server has none.
    Ctrl-C leaves the run running. Who asks: KFP_TOKEN_FILE, KFP_TOKEN, KFP_COOKIES; whom to trust: KFP_CA_FILE.

    Example: `camopd submit medical.toml -s output_uri=s3://models/runs`
    """
    from camopd.kubeflow import submit as submitting
    from camopd.store import Store

    connection = _connected(host, namespace)
    options = submitting.Options(pipeline, pools, experiment, service_account, run_name, full=preflight is Preflight.full)
    store = Store()
    done = submitting.submit(connection, recipe, parameters_of(set_), options, store=store, say=typer.echo)
    typer.echo(f"Run:      {done.run_id}  ({done.name}, {done.version.pipeline} version {done.version.name})")
    for label, link in (("UI", connection.run_link(done.run_id)), ("MLflow", submitting.tracking_link(done))):
        if link:
            typer.echo(f"{label + ':':<9} {link}")
    if watch_:
        _follow(connection, done.run_id)
    else:
        typer.echo(f"Follow:   camopd watch {done.run_id}")


def watch(
    run_id: Annotated[str, typer.Argument(help="Id of the run, as submit prints it and the UI's address ends with it.")],
    namespace: NamespaceOption = "",
    host: HostOption = "",
) -> None:
    """Follow a run on Kubeflow Pipelines to its end: progress, then the result, or which step failed and why.

    **Reads** the KFP API and, where it can be reached, the run's store. Exit code 1: the run did not succeed.

    Example: `camopd watch 5f0c2d4e-0d6c-4a4e-9d0b-0a8f1c2e3b4d`
    """
    _follow(_connected(host, namespace), run_id)


def sync(
    file: Annotated[Path, typer.Argument(help="Schedules, pipeline and pools: JSON or YAML, as the chart writes it.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what differs; exit code 3 where something does.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take this owner's schedules away; before an uninstall.")] = False,
    host: HostOption = "",
) -> None:
    """Make the cluster's schedules what a file says. Called again, it finds nothing to do.

    **Reads** the KFP API, and recipes. **Writes** a pipeline version, where the server has none of that content, and recurring
    runs. Nothing of other owners is touched and no run is stopped: a recurring run with a run in flight is only switched off.

    Example: `camopd sync schedules.yaml --dry-run`
    """
    from camopd.kubeflow import schedules
    from camopd.kubeflow import sync as syncing
    from camopd.store import Store

    if remove:
        owner, namespace = schedules.owner_of(file)
        differs = syncing.remove(_connected(host, namespace), owner, say=typer.echo, dry_run=dry_run)
    else:
        wanted = schedules.read(file)
        differs = syncing.sync(_connected(host, wanted.namespace), wanted, store=Store(), say=typer.echo, dry_run=dry_run)
    if dry_run and differs:
        raise typer.Exit(3)


def _connected(host: str, namespace: str) -> Connection:
    from camopd.kubeflow.client import connect

    connection = connect(host, namespace)
    if caution := connection.caution():
        typer.echo(f"Warning: {caution}", err=True)
    return connection


def _follow(connection: Connection, run_id: str) -> None:
    from rich.console import Console

    from camopd.errors import CamopdError
    from camopd.kubeflow.watch import watch as follow
    from camopd.store import Store

    os.environ.setdefault("AWS_MAX_ATTEMPTS", "3")  # a store that does not answer must not stop the display for minutes
    again = f"camopd watch {run_id}"
    try:
        succeeded = follow(connection, run_id, store=Store(), console=Console(highlight=False, markup=False, soft_wrap=True))
    except KeyboardInterrupt:
        typer.echo(f"\nThe run goes on. Follow it again: {again}")
        raise typer.Exit(130) from None
    except CamopdError:
        typer.echo(f"Not followed any more; whatever the run does, it goes on. Follow it again: {again}", err=True)
        raise
    if not succeeded:
        raise typer.Exit(1)
