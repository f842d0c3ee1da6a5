"""What people do with a registered model: approve, reject, roll back, and look at what was done."""

from __future__ import annotations

import getpass
import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from camopd.approval import Decision
    from camopd.history import Actor, Line
    from camopd.tracking import Registry

ModelArgument = Annotated[str, typer.Argument(help="Name of the registered model.")]
ByOption = Annotated[str, typer.Option(envvar="CAMOPD_USER", help="Who decides. Your login is kept beside it.")]
WhyOption = Annotated[str, typer.Option(help="Why, for the history.")]
VersionOption = Annotated[int | None, typer.Option(min=1, help="Which version; none: the one that waits.")]
TrackingOption = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow's tracking URI.")]


def approve(
    model: ModelArgument,
    by: ByOption,
    why: WhyOption,
    version: VersionOption = None,
    again: Annotated[bool, typer.Option("--again", help="Also a version that was rejected or rolled back.")] = False,
    tracking_uri: TrackingOption = "",
) -> None:
    """Let the alias in use point to a version that waits, once every file of its weights was read and found whole.

    **Reads** the registry and the version's weights. **Writes** the alias, and who decided and why on the version.

    Example: `camopd approve icd-coder --by "Ana Lima" --why "read 50 answers"`
    """
    from camopd import approval
    from camopd.store import Store

    registry = _registry(model, tracking_uri)
    done = approval.approve(model, registry, Store(), _actor(by, why), version=version, again=again)
    _say("approved", model, done)


def reject(
    model: ModelArgument, by: ByOption, why: WhyOption, version: VersionOption = None, tracking_uri: TrackingOption = ""
) -> None:
    """Write down that a version that waits is not wanted. Its weights stay where they are.

    **Reads** the registry. **Writes** who decided and why on the version, and takes the candidate's alias from it.

    Example: `camopd reject icd-coder --by "Ana Lima" --why "invents codes for rare diseases"`
    """
    from camopd import approval

    done = approval.reject(model, _registry(model, tracking_uri), _actor(by, why), version=version)
    typer.echo(f"{model} version {done.version.number} is rejected; no alias was moved")


def rollback(
    model: ModelArgument,
    by: ByOption,
    why: WhyOption,
    to: Annotated[int | None, typer.Option(min=1, help="Version to go back to; none: the one before.")] = None,
    alias: Annotated[str, typer.Option(help="The alias in use.")] = "champion",
    tracking_uri: TrackingOption = "",
) -> None:
    """Let the alias in use point to the version before, once every file of its weights was read and found whole.

    **Reads** the registry, the model's history and the weights. **Writes** the alias, and who decided and why on the version
    that it leaves, which no run that is started again makes the one in use.

    Example: `camopd rollback icd-coder --by "Ana Lima" --why "complaints since Monday"`
    """
    from camopd import approval
    from camopd.store import Store

    registry = _registry(model, tracking_uri)
    done = approval.rollback(model, registry, Store(), _actor(by, why), alias=alias, to=to)
    _say("rolled back", model, done)


def history(
    model: ModelArgument,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tracking_uri: TrackingOption = "",
) -> None:
    """Show who made which version the one in use, when, why, and on which scores.

    **Reads** the registry. **Writes** nothing.

    Example: `camopd history icd-coder`
    """
    from camopd import approval

    found = approval.history(model, _registry(model, tracking_uri))
    if json_:
        typer.echo(json.dumps([line.record() for line in found], indent=1, ensure_ascii=False))
        return
    for line in found:
        typer.echo(_shown(line))


def _registry(model: str, tracking_uri: str) -> Registry:
    from camopd.config import Tracking
    from camopd.errors import RefusedError
    from camopd.tracking import tracker_for

    registry = tracker_for(Tracking(uri=tracking_uri or None)).registry(model)
    if registry is None:
        raise RefusedError("no registry is known; give --tracking-uri, or set MLFLOW_TRACKING_URI")
    return registry


def _actor(by: str, why: str) -> Actor:
    from camopd.history import Actor

    try:
        login = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        login = ""
    return Actor(by, why, login)


def _say(what: str, model: str, done: Decision) -> None:
    before = "nothing" if done.before is None else f"version {done.before}"
    typer.echo(f"{model} {what}: alias {done.alias} points to version {done.now}, before to {before}")
    typer.echo(f"  {done.checked}")


def _shown(line: Line) -> str:
    from camopd.history import stamp

    event = line.event
    moved = f"  {event.alias}: {event.before or 'nothing'} -> {event.after or 'nothing'}" if event.before or event.after else ""
    rows = [f"{stamp(event.at)[:19]}Z  version {event.version}  {event.what}{moved}"]
    login = f" ({event.login})" if event.login and event.login != event.by else ""
    rows += [f"    by {event.by}{login}: {event.why}"] if event.by else []
    shares = (f"{name.replace('_', ' ')} {v:.3f} ({low:.3f} to {high:.3f})" for name, (v, low, high) in line.scores.items())
    rows += [f"    {text}" for text in (", ".join(shares), line.report) if text and event.what != "moved outside"]
    return "\n".join(rows)
