"""MLflow behind the interface of camopd.tracking. The only file that imports mlflow.

Credentials are MLflow's own business (MLFLOW_TRACKING_TOKEN and its like, sent to the tracking URI alone); no message shows
those that a URI holds.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar
from urllib.parse import urlsplit

from camopd.errors import TrackingError
from camopd.store import is_s3
from camopd.tracking import OutageError, Version, logbook
from camopd.tracking.logbook import Entry, Facts, Identity

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LOGGED = "camopd.logged."  # + an entry's key: content id of what MLflow holds of it, set when all of it has arrived
NOW = "camopd.now."  # + a parameter's name: its value now, where the parameter itself (written once) has another
MAX_METRICS, MAX_PARAMS = 500, 50  # a request; MLflow's limits are 1,000 metrics, 100 parameters or tags, and 1 MB
MAX_DIGEST = 36  # characters of a data set's digest that MLflow takes

# MLflow's own are 120 s and 7 tries with pauses, several minutes in which a GPU would wait. Here it never tries again by
# itself: after a lost answer that makes a second run or version, and ours look first at what is there. The user's go first.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # a 503 may ask for twenty minutes
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines a round
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


# --- Errors ---------------------------------------------------------------------------------------------------------------


class _Named(Protocol):
    uri: str


Asker = TypeVar("Asker", bound=_Named)
Given = ParamSpec("Given")
Result = TypeVar("Result")


def _asks(method: Callable[Concatenate[Asker, Given], Result]) -> Callable[Concatenate[Asker, Given], Result]:
    """Turn whatever MLflow and what is below it raise into TrackingError, or OutageError where a later try may do."""

    @functools.wraps(method)
    def asked(self: Asker, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except TrackingError:
            raise
        except ImportError as error:
            raise TrackingError(f"MLflow cannot be imported ({error}); pip install 'camopd[track]'") from None
        except _library_errors() as error:
            # Not chained: the cause's text may hold the password of a URI, and a traceback would print it.
            raise _translated(error, self.uri) from None

    return asked


def _library_errors() -> tuple[type[Exception], ...]:
    """What MLflow lets through: its own errors, the database's behind sqlite:// URIs, the object store's behind artifacts."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return OSError, MlflowException, SQLAlchemyError, Boto3Error, BotoCoreError, ClientError  # OSError: also requests'


def _translated(error: Exception, uri: str) -> TrackingError:
    from mlflow.exceptions import MlflowException

    said = redact(" ".join(str(error).split()))
    if "Invalid Host header" in said:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return TrackingError(f"{uri} refuses our Host header (403); start its server with --allowed-hosts {host}")
    if isinstance(error, MlflowException) and error.get_http_status_code() < 500 and error.get_http_status_code() != 429:
        return TrackingError(f"{uri} refused: {said[:300]}")
    return OutageError(f"{uri} does not answer as it should: {said[:300]}")


def redact(text: str) -> str:
    """Hide user and password of every URI in a text."""
    return re.sub(r"//[^/\s'\"]+@", "//***@", text)


# --- Runs -----------------------------------------------------------------------------------------------------------------


class MlflowTracker:
    """An MLflow tracking server (http, https) or database (sqlite, postgresql).

    Args:
        uri: tracking URI.
        experiment: name of the experiment that new runs go to.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = redact(uri)
        self._tracking_uri, self._experiment = uri, experiment

    @functools.cached_property
    def _client(self) -> MlflowClient:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they report each table and each version
        return MlflowClient(self._tracking_uri)

    @_asks
    def open(self, identity: Identity, *, injected: bool = True) -> MlflowRun:
        """The recovery's run: the injected one (MLFLOW_RUN_ID), else the one with our tags, else a new one."""
        run, owned = self._injected() if injected else None, False
        if run is None:
            run, owned = self._find(identity) or self._start(identity), True
        return MlflowRun(self._client, run, identity, uri=self.uri, owned=owned)

    def _injected(self) -> Run | None:
        """The topmost run above MLFLOW_RUN_ID, where somebody has set it.

        Kubeflow's plugin (KEP-12862) gives each task a nested run of its own; what all tasks share is the pipeline's run above.
        """
        run_id = os.environ.get("MLFLOW_RUN_ID")
        run = None
        while run_id:
            run = self._client.get_run(run_id)
            run_id = run.data.tags.get("mlflow.parentRunId")
        return run

    def _find(self, identity: Identity) -> Run | None:
        found = self._client.search_runs(
            [self._experiment_id()], f"tags.`camopd.run_id` = '{identity.run_id}'", order_by=["attributes.start_time ASC"]
        )
        return next((run for run in found if run.data.tags.get("camopd.run_uri") == identity.run_uri), None)

    def _start(self, identity: Identity) -> Run:
        return self._client.create_run(self._experiment_id(), tags=dict(identity.tags), run_name=identity.run_id)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        known = self._client.get_experiment_by_name(self._experiment)
        if known is not None:
            return known.experiment_id
        try:
            return self._client.create_experiment(self._experiment, artifact_location=_artifacts_beside(self._tracking_uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self._experiment_id()  # another process was faster

    def registry(self, model_name: str) -> MlflowRegistry:
        return MlflowRegistry(self, model_name)


def _artifacts_beside(uri: str) -> str | None:
    """Where files go that belong to an sqlite database; MLflow's own choice is a folder wherever the program was started."""
    database = uri.removeprefix("sqlite:///").partition("?")[0]
    return None if database == uri else (Path(database).absolute().parent / "mlflow-artifacts").as_uri()


class MlflowRun:
    """The recovery's run and the nested ones below it.

    Args:
        client: MLflow's client.
        run: the recovery's run as it is now.
        identity: whose run it is.
        uri: the tracking URI, fit to be shown.
        owned: False when somebody else started it: then its end is theirs to tell.
    """

    def __init__(self, client: MlflowClient, run: Run, identity: Identity, *, uri: str, owned: bool) -> None:
        self.uri, self.run_id = uri, run.info.run_id
        self._client, self._run, self._owned = client, run, owned
        self._params, self._tags = dict(run.data.params), dict(run.data.tags)
        self._tag(identity.tags)

    def lacks(self, entry: Entry) -> bool:
        return self._tags.get(LOGGED + entry.key) != entry.content_id

    def send(self, entry: Entry) -> None:
        self._send(entry, entry.facts())  # read out here: the store's errors are not the server's

    @_asks
    def _send(self, entry: Entry, facts: Facts) -> None:
        if entry.nested:
            nested = self._nested(entry, facts)
            self._log(nested, facts)
            self._client.set_terminated(nested, "FINISHED", facts.ended_ms)
            facts = Facts(points=facts.summary)
        params, changed = reconciled(facts.params, self._params, self._tags)
        self._log(self.run_id, Facts(params, facts.tags, facts.points, facts.datasets, facts.files))
        self._params |= params
        self._tag({**facts.tags, **changed, LOGGED + entry.key: entry.content_id})

    @_asks
    def close(self, status: str) -> None:
        if not self._owned or self._run.info.status == status:
            return
        if status == "RUNNING":
            self._client.update_run(self.run_id, status)
        else:
            self._client.set_terminated(self.run_id, status)

    def _nested(self, entry: Entry, facts: Facts) -> str:
        """The entry's own run: one that an earlier attempt began, or a new one."""
        ours = {"mlflow.parentRunId": self.run_id, "camopd.content_id": entry.content_id}
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in ours.items())
        found = self._client.search_runs([self._run.info.experiment_id], wanted, max_results=1)
        if found:
            return found[0].info.run_id
        run = self._client.create_run(self._run.info.experiment_id, facts.began_ms, tags=ours, run_name=entry.key)
        return run.info.run_id

    def _tag(self, tags: Mapping[str, str]) -> None:
        """Set the tags that are not there yet."""
        new = {name: value for name, value in tags.items() if self._tags.get(name) != value}
        self._log(self.run_id, Facts(tags=new))
        self._tags |= new

    def _log(self, run_id: str, facts: Facts) -> None:
        from mlflow.entities import Metric, Param, RunTag

        for path, text in facts.files.items():
            self._client.log_text(run_id, text, path)
        if facts.datasets:
            self._client.log_inputs(run_id, [_dataset_input(dataset) for dataset in facts.datasets])
        for params in _batches(list(facts.params.items()), MAX_PARAMS):
            self._client.log_batch(run_id, params=[Param(name, value) for name, value in params])
        for points in _batches(facts.points, MAX_METRICS):
            self._client.log_batch(run_id, metrics=[Metric(p.name, p.value, p.time_ms, p.step) for p in points])
        for tags in _batches(list(facts.tags.items()), MAX_PARAMS):
            self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags])


def reconciled(
    wanted: Mapping[str, str], params: Mapping[str, str], tags: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters still to be written, and tags for those that were written with another value: MLflow refuses a second one."""
    new = {name: value for name, value in wanted.items() if name not in params}
    changed = {
        NOW + name: value
        for name, value in wanted.items()
        if params.get(name, value) != value or NOW + name in tags  # a value that has come back, too
    }
    return new, changed


def _dataset_input(dataset: logbook.Dataset) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = dataset.content_id.removeprefix("sha256:")[:MAX_DIGEST]
    source = json.dumps({"uri": dataset.source})
    tags = [InputTag("mlflow.data.context", "training"), InputTag("camopd.content_id", dataset.content_id)]
    return DatasetInput(Dataset(dataset.name, digest, "s3" if is_s3(dataset.source) else "local", source), tags)


Item = TypeVar("Item")


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# --- Registry -------------------------------------------------------------------------------------------------------------


class MlflowRegistry:
    """The versions and aliases of one registered model."""

    def __init__(self, tracker: MlflowTracker, model_name: str) -> None:
        self.uri = tracker.uri
        self._tracker, self._name = tracker, model_name

    @property
    def _client(self) -> MlflowClient:
        return self._tracker._client

    @_asks
    def versions(self) -> list[Version]:
        found, token = [], None
        while True:
            page = self._client.search_model_versions(f'name = "{self._name}"', page_token=token)
            found += [
                Version(
                    int(one.version),
                    dict(one.tags),
                    created=one.creation_timestamp / 1000,
                    source=one.source or "",
                    ready=one.status == "READY",
                )
                for one in page
            ]
            token = page.token
            if not token:
                return sorted(found, key=lambda version: version.number)

    @_asks
    def aliased(self, alias: str) -> int | None:
        from mlflow.exceptions import MlflowException

        try:
            version = self._client.get_registered_model(self._name).aliases.get(alias)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return None if version is None else int(version)

    @_asks
    def download_uri(self, version: int) -> str:
        uri = self._client.get_model_version_download_uri(self._name, str(version))
        if not uri.startswith("runs:/"):
            return uri
        run_id, _, path = uri.removeprefix("runs:/").partition("/")  # a version by MlflowClient keeps it as it was given
        return f"{self._client.get_run(run_id).info.artifact_uri.rstrip('/')}/{path}"

    @_asks
    def add(self, checkpoint_uri: str, tags: Mapping[str, str], identity: Identity) -> Version:
        """A new version whose source is the checkpoint itself: an ``s3://`` prefix or, without a server, a ``file://`` folder.

        A server refuses a folder of this machine as a source, which it could not read anyhow. There the source is an artifact
        of the recovery's run, ``checkpoint/checkpoint.json``, that names the folder, as the tag ``camopd.checkpoint_uri`` does.
        """
        self._make_model()
        run_id = self._tracker.open(identity).run_id
        place = logbook.absolute(checkpoint_uri)
        tags = {**tags, "camopd.checkpoint_uri": place}
        source = place if is_s3(place) else Path(place).as_uri()
        if not is_s3(place) and self.uri.startswith("http"):
            self._client.log_text(run_id, json.dumps(tags, indent=1), "checkpoint/checkpoint.json")
            source = f"runs:/{run_id}/checkpoint"
        version = self._client.create_model_version(self._name, source, run_id, tags, await_creation_for=0)
        return Version(int(version.version), tags)

    def _make_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @_asks
    def remove(self, version: int) -> None:
        self._client.delete_model_version(self._name, str(version))

    @_asks
    def tag(self, version: int, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._client.set_model_version_tag(self._name, str(version), name, value)

    @_asks
    def untag(self, version: int, tag: str) -> None:
        self._client.delete_model_version_tag(self._name, str(version), tag)

    @_asks
    def point(self, alias: str, version: int) -> None:
        self._client.set_registered_model_alias(self._name, alias, str(version))

    @_asks
    def unpoint(self, alias: str) -> None:
        self._client.delete_registered_model_alias(self._name, alias)

    @_asks
    def files(self, version: int) -> list[str]:
        from mlflow.artifacts import list_artifacts

        place = self._client.get_model_version_download_uri(self._name, str(version))
        return [file.path for file in list_artifacts(place, tracking_uri=self._tracker._tracking_uri)]
