"""Pipelines on the server: which version a run is to use, and a compiled file that becomes one, once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import yaml

from camopd.errors import ClusterError, InputError, Problem
from camopd.kubeflow.client import ApiError, Connection
from camopd.kubeflow.spec import Spec, name_of

PIPELINE = "camopd-recovery"
EQUALS = 1  # the number of a predicate's operation


@dataclass(frozen=True)
class Version:
    """A pipeline version, on the server or about to be uploaded.

    Attributes:
        pipeline: the pipeline's name.
        name: the version's.
        spec: the compiled pipeline.
        pipeline_id: empty where the server has no such pipeline yet.
        version_id: empty where the server has no such version yet.
        file: what to upload then.
    """

    pipeline: str
    name: str
    spec: Spec
    pipeline_id: str = ""
    version_id: str = ""
    file: Path | None = None


def newest(connection: Connection, pipeline: str) -> Version | None:
    """The newest version of a pipeline on the server, the namespace's own before the shared one; None where there is none."""
    for pipeline_id in _pipeline_ids(connection, pipeline).values():
        order = {"page_size": 1, "sort_by": "created_at desc"}
        listed = connection.pipelines.pipeline_service_list_pipeline_versions(pipeline_id, **order)
        for found in listed.pipeline_versions or ():
            return Version(
                pipeline, found.name or found.display_name, found.pipeline_spec, pipeline_id, found.pipeline_version_id
            )
    return None


def version_of(connection: Connection, file: Path, pipeline: str = "") -> Version:
    """The version that holds a compiled file's content, which its name says; without ids where it has to be uploaded.

    Args:
        connection: to the KFP API.
        file: the compiled file.
        pipeline: name of the pipeline on the server; empty: the file's own.

    Raises:
        InputError: no such file, or no compiled pipeline.
    """
    wrong = Problem("--pipeline", f"{file} is no compiled pipeline", "give what `python -m pipelines.compile -o FILE` writes")
    try:
        content = file.read_bytes()
        spec = next((each for each in yaml.safe_load_all(content) if isinstance(each, dict) and "pipelineInfo" in each), None)
    except OSError as error:
        raise InputError([Problem("--pipeline", f"{file} cannot be read ({error.strerror})", "check the path")]) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError([wrong]) from None
    if spec is None:
        raise InputError([wrong])
    name = f"sha256-{hashlib.sha256(content).hexdigest()[:12]}"
    return _found(connection, Version(pipeline or name_of(spec), name, spec, file=file))


def uploaded(connection: Connection, version: Version) -> Version:
    """The version with its ids, uploaded where the server had it not. Raises ApiError."""
    if version.version_id:
        return version
    made = version if version.pipeline_id else replace(version, pipeline_id=_new_pipeline(connection, version.pipeline))
    try:
        answer = connection.uploads.upload_pipeline_version(str(made.file), name=made.name, pipelineid=made.pipeline_id)
    except ApiError as error:
        if error.status == 409 and (found := _found(connection, made)).version_id:
            return found  # somebody else has just uploaded the same content
        if error.status == 400 and connection.multi_user:
            hint = f"most often the rights to upload pipelines in namespace {connection.namespace} are missing"
            raise ApiError(f"{error}; {hint}", error.status) from None
        raise
    return replace(made, version_id=answer.pipeline_version_id)


def _new_pipeline(connection: Connection, name: str) -> str:
    """Made empty, since an upload would name its first version after the pipeline."""
    try:
        made = connection.pipelines.pipeline_service_create_pipeline({"name": name, "display_name": name, **connection.owned})
    except ApiError as error:
        known = _pipeline_ids(connection, name).get(connection.namespace) if error.status == 409 else None
        if known:
            return known  # somebody else has just made it
        raise
    return str(made.pipeline_id)


def _found(connection: Connection, version: Version) -> Version:
    """With the ids of what is there: the version wherever it may be used, else the pipeline that is one's own to add to."""
    places = _pipeline_ids(connection, version.pipeline)
    for pipeline_id in places.values():
        listed = connection.pipelines.pipeline_service_list_pipeline_versions(pipeline_id, filter=equals("name", version.name))
        for found in listed.pipeline_versions or ():
            return replace(version, pipeline_id=pipeline_id, version_id=found.pipeline_version_id)
    return replace(version, pipeline_id=places.get(connection.namespace, ""))


def _pipeline_ids(connection: Connection, name: str) -> dict[str, str]:
    """Id of the pipeline by namespace, one's own first; the empty one is everybody's, and the only one without users.

    Not by the API's own question for a name, which without a namespace answers with anybody's newest pipeline of that name.
    """
    found = {}
    for namespace in dict.fromkeys((connection.namespace, "")):
        owned = {"namespace": namespace} if namespace else {}
        try:
            listed = connection.pipelines.pipeline_service_list_pipelines(filter=equals("name", name), **owned)
        except ApiError as error:
            if error.status == 400 and not namespace and connection.multi_user:
                continue  # a server that wants a namespace for every pipeline
            raise
        for each in listed.pipelines or ():
            if not connection.multi_user or (each.namespace or "") == namespace:
                found[namespace] = str(each.pipeline_id)
    return found


def equals(key: str, value: str) -> str:
    """A list's filter; percent signs and pluses of a value are decoded once more by the server."""
    return quote(json.dumps({"predicates": [{"operation": EQUALS, "key": key, "stringValue": value}]}))


# --- Compiling ------------------------------------------------------------------------------------------------------------


@contextmanager
def compiled(pools: Path | None) -> Iterator[Path]:
    """The compiled file: the one that lies beside the sources, or one made for a cluster's pools.

    Raises:
        InputError: the pools file is wrong.
        ClusterError: the sources of the pipeline are not on this machine.
    """
    root = next(
        (place for place in (Path.cwd(), Path(__file__).parents[3]) if (place / "pipelines/recovery.yaml").is_file()), None
    )
    if root is None:
        fix = f"give --pipeline FILE, or have {PIPELINE} uploaded by whoever runs the cluster"
        raise ClusterError(f"the pipeline's sources are not here, as they are in a checkout and in the image core: {fix}")
    if pools is None:
        yield root / "pipelines/recovery.yaml"
        return
    with tempfile.TemporaryDirectory(prefix="camopd-") as folder:
        target = Path(folder, f"{PIPELINE}.yaml")
        command = [sys.executable, "-m", "pipelines.compile", "--pools", str(pools.absolute()), "-o", str(target)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(
                [Problem("--pools", done.stderr.strip() or "could not be compiled", "see pipelines/pools.example.toml")]
            )
        yield target
