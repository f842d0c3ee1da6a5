"""`camopd gc`: what the runs below an output no longer need."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from camopd.cli.options import place_of

if TYPE_CHECKING:
    from camopd.collect import Inventory, Removed
    from camopd.retention import Reference, Verdict
    from camopd.store import Store
    from camopd.store.sweeper import Found

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def seconds_of(text: str) -> float:
    """``30d -> 2592000.0``; minutes, hours, days, weeks."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip())
    if match is None:
        raise typer.BadParameter(f"write a number and m, h, d or w, such as 30d, not {text!r}", param_hint="--older-than")
    return float(match[1]) * _UNITS[match[2]]


def gc(
    output: Annotated[str, typer.Argument(help="Folder or s3:// prefix that recipes name as output; runs lie below it.")],
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Leave runs alone that were written to since: 12h, 30d, 8w. Never below a day.")
    ] = "30d",
    keep_last: Annotated[int, typer.Option(min=0, metavar="N", help="Leave the newest N runs of each recipe alone.")] = 0,
    checkpoints: Annotated[
        str, typer.Option(metavar="last|none", help="Of a finished run: the last checkpoint stays, or none.")
    ] = "last",
    whole_runs: Annotated[
        bool, typer.Option("--whole-runs", help="Remove runs that stopped, failed or were abandoned, evidence included.")
    ] = False,
    no_registry: Annotated[
        bool, typer.Option("--no-registry", help="There is no MLflow whose versions could refer to these runs.")
    ] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Do it. Without it nothing is removed.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what finished runs no longer need, and with `--delete` remove it.

    **Goes**: the tables between the stages and every checkpoint before the last. **Stays**: report, evaluation, release, plan,
    records, the last checkpoint; whatever a registry version or another run refers to; runs that are not finished, or were
    written to within a day; every file that camopd did not write. Inputs are never touched.

    Example: `camopd gc s3://models/runs --older-than 14d --delete`
    """
    from camopd.collect import look, old_jobs
    from camopd.retention import Policy, decide
    from camopd.store import Store

    if checkpoints not in ("last", "none"):
        raise typer.BadParameter(f"write last or none, not {checkpoints!r}", param_hint="--checkpoints")
    policy = Policy(seconds_of(older_than), keep_last, "none" if checkpoints == "none" else "last", whole_runs)
    store, now = Store(), time.time()
    found = look(place_of(output), store, now)
    found, references, unknown = _references(found, no_registry=no_registry, must_know=delete)
    verdicts = decide(found.runs, references, policy, now)
    jobs = old_jobs(found, policy, now)
    removed = _sweep(found, verdicts, jobs, store, quiet=json_) if delete else None
    if json_:
        typer.echo(
            json.dumps(_record(found, verdicts, jobs, now, "none" if no_registry else unknown or "asked", removed), indent=1)
        )
    elif removed is None:
        _print(found, verdicts, jobs, now)
        if unknown:
            typer.echo(f"Nothing can be removed now: {unknown}")
        elif any(verdict.bytes for verdict in verdicts):
            typer.echo("Nothing was removed. The same with --delete does it.")


def _references(found: Inventory, *, no_registry: bool, must_know: bool) -> tuple[Inventory, list[Reference], str]:
    """What refers to the runs, and why the registry could not be asked, if it could not; with ``must_know`` that is an error.

    Where the registry was asked, it knows best: a version that a release.json names may have been deleted since.
    """
    from dataclasses import replace

    from camopd.collect import references_in_registry, references_of
    from camopd.errors import CamopdError

    own = references_of(found.runs)
    if no_registry:
        return found, own, ""
    try:
        registered = references_in_registry(found.runs)
    except CamopdError as error:
        if must_know:
            raise
        return found, own, str(error)
    return replace(found, runs=tuple(replace(run, released=()) for run in found.runs)), [*own, *registered], ""


def _sweep(found: Inventory, verdicts: list[Verdict], jobs: list[Found], store: Store, *, quiet: bool) -> list[Removed]:
    from camopd.collect import sweep

    done: list[Removed] = []
    for one in sweep(found, verdicts, jobs, store):
        done.append(one)
        if not quiet:
            typer.echo(f"{one.what}: {one.problem}" if one.problem else f"removed {one.what} ({_size(one.bytes)})")
    if not quiet:
        typer.echo(f"{_size(sum(one.bytes for one in done))} removed." if done else "Nothing to remove.")
    return done


def _print(found: Inventory, verdicts: list[Verdict], jobs: list[Found], now: float) -> None:
    from camopd.retention import in_days

    rows = [("run", "age", "state", "would go", "bytes")]
    for verdict in verdicts:
        age = in_days(now - verdict.run.newest)
        rows.append((verdict.run.name, age, verdict.state, _what(verdict), _size(verdict.bytes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, sentences in zip(rows, [(), *(verdict.keeps for verdict in verdicts)], strict=True):
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
        for sentence in sentences:
            typer.echo(f"    stays: {sentence}")
    if jobs:
        typer.echo(f"{len(jobs)} records of pipeline runs in jobs/ would go.")
    if found.uploads:
        typer.echo(f"The parts of {len(found.uploads)} uploads that nobody ended would go.")
    if found.others:
        typer.echo(f"No runs, and left alone: {', '.join(found.others[:10])}")


def _what(verdict: Verdict) -> str:
    """``4 tables, 11 checkpoints``; ``all`` of a whole run."""
    if verdict.whole:
        return "all"
    kinds = [unit.kind for unit in verdict.removes]
    return ", ".join(f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) > 1)}" for kind in dict.fromkeys(kinds)) or "nothing"


def _size(count: int) -> str:
    from camopd.evaluation.report import size

    return size(count)


def _record(
    found: Inventory,
    verdicts: list[Verdict],
    jobs: list[Found],
    now: float,
    registry: str,
    removed: list[Removed] | None,
) -> dict[str, object]:
    runs = [
        {
            "run": verdict.run.name,
            "age_seconds": round(now - verdict.run.newest),
            "state": verdict.state,
            "whole": verdict.whole,
            "goes": [{"name": unit.name, "kind": unit.kind, "bytes": unit.bytes} for unit in verdict.removes],
            "bytes": verdict.bytes,
            "keeps": list(verdict.keeps),
        }
        for verdict in verdicts
    ]
    records = [file.name for file in jobs]
    uploads = [upload.name for upload in found.uploads]
    record: dict[str, object] = {"output": found.output, "runs": runs, "jobs": records, "uploads": uploads}
    record |= {"others": list(found.others), "registry": registry}
    return record | ({} if removed is None else {"removed": [asdict(one) for one in removed]})
