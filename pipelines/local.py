"""Run a recipe through the compiled pipeline on this machine, with live progress and the result as a table (``make demo``).

``python -m pipelines.local recipes/micro.toml --set seed=2``. KFP runs in a process of its own, whose many words go to a log.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from camopd import workflow
from camopd.board import Board, Tail, clock
from camopd.errors import CamopdError, InputError, Problem
from camopd.outcome import describe, print_result, result_of
from camopd.plan import Plan
from camopd.recipe.parameters import FORM_FIELDS, ROLE_FIELDS, SWITCH, did_you_mean
from camopd.store import Store, digest
from pipelines.containers import Folders, absolute_form, folders_of, share_database

CACHE = Path(".cache/pipeline")
LOG = "pipeline.log"
REGISTRY = "sqlite:///runs/mlflow.db"
CONTAINERS_REGISTRY = f"sqlite:///{Path('runs/containers/mlflow.db').absolute()}"  # their users may not write the other one
ANSI = re.compile(r"\x1b\[[0-9;]*m")
KFP_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d+ - [A-Z]+ - ")
BEGUN = re.compile(KFP_LINE.pattern + r"Executing task '(?P<task>[^']+)'")
ENDED = re.compile(KFP_LINE.pattern + r"Task '(?P<task>[^']+)' finished with status (?P<status>[A-Z]+)")
RAISED = re.compile(rf"(?:{KFP_LINE.pattern}|ERROR:root:)Task \S+ failed with exception: (?P<reason>.*)")


def run_form(assignments: Sequence[str]) -> dict[str, str | bool]:
    """``["seed=2"] -> {"method_seed": "2"}``. Raises InputError for what the pipeline's run form has no field for."""
    fields = {key: field for field, key in FORM_FIELDS.items() if field != SWITCH}
    names = [*FORM_FIELDS, *ROLE_FIELDS]
    pairs = [(fields.get(key, key), value) for key, _, value in (text.partition("=") for text in assignments)]
    unknown = [Problem(key, "the run form has no such field", did_you_mean(key, names)) for key, _ in pairs if key not in names]
    if unknown:
        raise InputError(unknown)
    return {field: value.lower() == "true" if field == SWITCH else value for field, value in pairs}


def log_folder(run_uri: str) -> Path:
    """Where the log of a run's pipeline lies: the same for each start; another for the same run under another output."""
    return CACHE / f"{run_uri.rpartition('/')[2]}-{digest(run_uri).removeprefix('sha256:')[:6]}"


# --- Running --------------------------------------------------------------------------------------------------------------


def run_pipeline(
    parameters: Mapping[str, str | bool], folder: Path, board: Board, console: Console, containers: Folders | None = None
) -> bool:
    """Start KFP's local runner, show how far it is until it ends, and say whether every task succeeded."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.jsonl"
    progress.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pipelines.runner", json.dumps(parameters), str(folder / "kfp")]
    command += [json.dumps(asdict(containers))] if containers else []
    environment = {**os.environ, "CAMOPD_PROGRESS": str(progress.absolute()), "PYTHONUNBUFFERED": "1"}
    with (
        (folder / LOG).open("w", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True) as process,
    ):
        try:
            follow(process, Tail(progress), board, console)
        finally:
            if process.poll() is None:  # interrupted: the stages are its children and go with it
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)  # a container takes a second to be removed
    return process.returncode == 0


def follow(process: subprocess.Popen[bytes], tail: Tail, board: Board, console: Console) -> None:
    """Show the board while the process lives: in place on a terminal, else a line for each finished stage."""
    begun = time.monotonic()
    live = Live(console=console, transient=True) if console.is_terminal else contextlib.nullcontext()
    with live as display:
        while process.poll() is None:
            for line in tail.read():
                board.update(line)
                if display is None and board.finished():
                    console.print(f"{board.sentence()}  ({board.times(time.monotonic() - begun, time.time())})")
            if display is not None:
                display.update(board.picture(time.monotonic() - begun, time.time()))
            time.sleep(0.2)


def last_words(log: str, count: int = 12) -> tuple[str, list[str]]:
    """The first task that failed, and the last lines that it wrote, from the local runner's log.

    The tasks that fail after it only refuse to go on without it. No task, and the log's end, where none of them failed.
    """
    lines = ANSI.sub("", log).splitlines()
    end, begin, task = first_failure(lines) or (len(lines), 0, "")
    words = [line for line in lines[begin:end] if line.strip() and not KFP_LINE.match(line)]
    words = textwrap.dedent("\n".join(words[-count:])).splitlines()
    raised = RAISED.search(lines[end]) if end < len(lines) else None
    return task, [*words, raised["reason"]][-count:] if raised else words


def first_failure(lines: Sequence[str]) -> tuple[int, int, str] | None:
    """Last and first line of the first task that failed, and its name.

    Where a task could not be run kfp 2.17 names the turn of the loop in place of the task, maybe after the next turn has begun:
    it is the one that has begun and does not end.
    """
    running, failures, raised = list[tuple[int, str]](), list[tuple[int, int, str]](), list[int]()
    for number, line in enumerate(lines):
        if found := BEGUN.search(line):
            running.append((number, found["task"]))
        elif found := ENDED.search(line):
            begun = max((entry for entry in running if entry[1] == found["task"]), default=(0, found["task"]))
            running = [entry for entry in running if entry != begun]
            if found["status"] == "FAILURE":
                failures.append((number, *begun))
        elif RAISED.search(line):
            raised.append(number)
    failures += [(end, *begun) for end, begun in zip(raised, running, strict=False)]
    failures += [(end, end, "") for end in raised[len(running) :]]  # its output could not be taken: it had ended
    return min(failures, default=None)


# --- Showing --------------------------------------------------------------------------------------------------------------


def show_failure(log: Path, plan: Plan, store: Store, console: Console) -> None:
    """What the failed task said last, what the run's own record says, and what to do next."""
    task, words = last_words(log.read_text(encoding="utf-8"))
    console.print(f"The task '{task}' failed first. Its last words:" if task else "The pipeline failed. Its last words:")
    for line in words:
        console.print(f"  {line}")
    console.print("\n" + describe(plan.run_uri, succeeded=False, store=store))
    console.print(f"Log: {log}")


def next_commands(recipe: str, seed: int, tracking_uri: str) -> dict[str, str]:
    """Three commands that one would try next, with what each is for."""
    here = Path(os.path.relpath(Path(sys.executable).parent))
    return {
        f"{here}/mlflow ui --backend-store-uri {tracking_uri}": "learning curves and the registry, in a browser",
        f"{here}/camopd run {recipe} --set seed={seed + 1}": "another seed, without Kubeflow",
        f"{here}/python -m pipelines.compile --pools pipelines/pools.example.toml -o gpu.yaml": "for a cluster with GPUs",
    }


# --- The command ----------------------------------------------------------------------------------------------------------


def recover(recipe: str, assignments: Sequence[str], console: Console, *, containers: bool = False) -> None:
    """Prepare here, run the pipeline unless all is done, and show the result.

    Args:
        recipe: path, URI or name of the recipe.
        assignments: ``key=value`` for fields of the run form.
        console: where to show it.
        containers: run the tasks in containers of their images; what is prepared here can be written by their users.

    Raises:
        CamopdError: the input is bad; nothing was started.
        typer.Exit: a task failed, which has been shown.
    """
    store, begun = Store(), time.monotonic()
    parameters = run_form(assignments)
    if containers:
        os.umask(0o002)
        recipe, parameters = absolute_form(recipe, parameters)
    # The pipeline begins with the same step; here it says at once what is wrong and whether anything is left to do.
    plan = Plan.load(store, workflow.prepare(recipe, parameters, store=store).uri)
    result, folder = result_of(plan, store), log_folder(plan.run_uri)
    tracking_uri = plan.recipe.tracking.uri or os.environ["MLFLOW_TRACKING_URI"]
    if result is not None:
        console.print("Everything was done already; nothing was run.")
    else:
        seen = None
        if containers:
            seen = folders_of(plan.recipe, recipe, tracking_uri, folder)
            share_database(tracking_uri)
        if not run_pipeline({"input_recipe": recipe, **parameters}, folder, Board(plan.recipe.num_rounds), console, seen):
            show_failure(folder / LOG, plan, store, console)
            raise typer.Exit(1)
        result = result_of(plan, store)
        console.print(f"Done in {clock(time.monotonic() - begun)}. Log: {folder / LOG}")
    assert result is not None, "the pipeline succeeded and left no evaluation"
    print_result(result, plan, console, store)
    console.print("Next:")
    for command, purpose in next_commands(recipe, plan.recipe.seed, tracking_uri).items():
        console.print(f"  {command}\n      {purpose}")


def main(
    recipe: Annotated[str, typer.Argument(help="Recipe: a TOML file or the name of a shipped one.")] = "recipes/micro.toml",
    set_: Annotated[list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="A run-form field, or its key.")] = [],  # noqa: B006
    containers: Annotated[bool, typer.Option(help="Tasks in containers of the images that `make images` builds.")] = False,
) -> None:
    """Run a recipe through the compiled pipeline by KFP's local runner. Started again after a stop or a kill, it goes on."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", CONTAINERS_REGISTRY if containers else REGISTRY)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        recover(recipe, set_, console, containers=containers)
    except CamopdError as error:
        console.print(str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)
