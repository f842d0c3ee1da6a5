"""`camopd <verb>`. Nothing heavy is imported before a verb runs: help must answer at once.

A verb is a function of one of the modules here; it parses, calls one function of the package and prints.
"""

from __future__ import annotations

import sys

import typer

from camopd import __version__
from camopd.attempts import heeding_sigterm
from camopd.cli import checking, cluster, planning, registry, retention, stages
from camopd.errors import CamopdError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Give a domain language model its lost general ability back, and keep the domain (CaMOPD).",
)

STAGES = (stages.prepare, stages.rollout, stages.score, stages.select, stages.train, stages.evaluate, stages.promote)
CLUSTER = (cluster.submit, cluster.watch, cluster.sync, checking.check)
REGISTRY = (registry.approve, registry.reject, registry.rollback, registry.history)
VERBS = (*STAGES, stages.run, stages.recover, planning.plan, *CLUSTER, *REGISTRY, retention.gc)
for verb in VERBS:
    app.command()(verb)


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
