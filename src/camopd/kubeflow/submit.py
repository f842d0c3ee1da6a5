"""A run is asked for: what is wrong is found first, then the pipeline is there, then the run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from camopd.errors import ClusterError, InputError, Problem
from camopd.kubeflow.checks import check_inputs, problems_of
from camopd.kubeflow.client import ApiError, Connection
from camopd.kubeflow.form import Wish, wish
from camopd.kubeflow.spec import variable_of
from camopd.kubeflow.versions import PIPELINE, Version, compiled, equals, newest, uploaded, version_of
from camopd.store import Store

EXPERIMENT = "camopd"


@dataclass(frozen=True)
class Options:
    """How a run is to be submitted.

    Attributes:
        pipeline: name of one on the server, whose newest version is taken, or a compiled file.
        pools: pools file to compile the pipeline for.
        experiment: KFP's, made where it is not there.
        service_account: of the run's pods; empty: the server's default.
        run_name: empty: the recipe's name and the time.
        full: whether prepare's checks are made from here.
    """

    pipeline: str = PIPELINE
    pools: Path | None = None
    experiment: str = EXPERIMENT
    service_account: str = ""
    run_name: str = ""
    full: bool = True


@dataclass(frozen=True)
class Submitted:
    """A run that was accepted."""

    run_id: str
    name: str
    version: Version
    wish: Wish


def submit(
    connection: Connection, source: str, values: dict[str, str], options: Options, *, store: Store, say: Callable[[str], None]
) -> Submitted:
    """Check a recipe and start a run of it.

    Args:
        connection: to the KFP API.
        source: the recipe's name, file or s3:// URI.
        values: by run-form field or dotted key, see camopd.kubeflow.form.
        options: how.
        store: reads the inputs.
        say: is told what is done, a sentence at a time.

    Raises:
        InputError: every problem found; nothing was uploaded or started.
        ApiError: the API refused.
        ClusterError: there is no pipeline to run.
    """
    with ExitStack() as opened:
        version = _version(connection, options, opened)
        asked = wish(source, values, version.spec, store=store)
        problems = problems_of(asked, version.spec) + _name_problems(options)
        if options.full:
            check_inputs(asked, problems, store)
        elif problems:
            raise InputError(problems)
        if not version.version_id:
            say(f"Uploading {version.pipeline}, version {version.name}")
        version = uploaded(connection, version)
    name = options.run_name or f"{asked.recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    run = connection.runs.run_service_create_run(
        {
            "display_name": name,
            "experiment_id": experiment_id(connection, options.experiment),
            "pipeline_version_reference": {"pipeline_id": version.pipeline_id, "pipeline_version_id": version.version_id},
            "runtime_config": {"parameters": dict(asked.form)},
            **({"service_account": options.service_account} if options.service_account else {}),
        }
    )
    return Submitted(str(run.run_id), name, version, asked)


def experiment_id(connection: Connection, name: str) -> str:
    """Id of KFP's experiment of that name, which is made where it is not there. Raises ApiError."""
    if found := _experiment_id(connection, name):
        return found
    try:
        made = connection.experiments.experiment_service_create_experiment({"display_name": name, **connection.owned})
    except ApiError as error:
        if error.status == 409 and (found := _experiment_id(connection, name)):
            return found  # somebody else has just made it
        raise
    return str(made.experiment_id)


def _experiment_id(connection: Connection, name: str) -> str:
    wanted = equals("display_name", name)
    listed = connection.experiments.experiment_service_list_experiments(filter=wanted, **connection.owned)
    return next((str(each.experiment_id) for each in listed.experiments or ()), "")


def _version(connection: Connection, options: Options, opened: ExitStack) -> Version:
    """What is to run: uploaded already, or a file that stays until the stack is closed."""
    is_file = options.pipeline.endswith((".yaml", ".yml")) or Path(options.pipeline).is_file()
    if is_file and options.pools:
        raise InputError(
            [Problem("--pools", "is for the pipeline of this version, and --pipeline is a file", "give one of the two")]
        )
    if is_file:
        return version_of(connection, Path(options.pipeline))
    found = None if options.pools else newest(connection, options.pipeline)
    if found is not None:
        return found
    if options.pipeline != PIPELINE:
        fix = f"give the name of one that is there, a compiled file, or nothing for {PIPELINE}"
        raise ClusterError(f"the server has no pipeline {options.pipeline!r}: {fix}")
    return version_of(connection, opened.enter_context(compiled(options.pools)))


def _name_problems(options: Options) -> list[Problem]:
    """What the API would refuse without a reason."""
    problems = []
    if not options.experiment.strip() or len(options.experiment.encode()) > 128:
        problems.append(Problem("--experiment", "is empty or longer than 128 bytes", "give a short name"))
    if options.service_account and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", options.service_account):
        problems.append(
            Problem("--service-account", f"{options.service_account!r} names no Kubernetes object", "check its spelling")
        )
    return problems


def tracking_link(submitted: Submitted) -> str:
    """Where MLflow is, by the recipe, the pods' variables or this machine's; empty where that is no web address."""
    places = (
        submitted.wish.recipe.tracking.uri,
        variable_of(submitted.version.spec, "prepare", "MLFLOW_TRACKING_URI"),
        os.environ.get("MLFLOW_TRACKING_URI"),
    )
    found = next((place for place in places if place), "")
    return re.sub(r"//[^/]*@", "//", found) if found.startswith(("http://", "https://")) else ""
