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

import yaml

from camopd.errors import ClusterError, InputError, Problem
from camopd.kubeflow.client import ApiError, Connection
from camopd.kubeflow.spec import Spec, name_of

PIPELINE = "camopd-recovery"
EQUALS = 1  # the operation of a filter's predicate


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
    pipeline_id = _pipeline_id(connection, pipeline)
    if not pipeline_id:
        return None
    listed = connection.pipelines.pipeline_service_list_pipeline_versions(pipeline_id, page_size=1, sort_by="created_at desc")
    for found in listed.pipeline_versions or ():
        return Version(pipeline, found.name or found.display_name, found.pipeline_spec, pipeline_id, found.pipeline_version_id)
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
        if error.status == 409 and (known := _pipeline_id(connection, name)):
            return known
        raise
    return str(made.pipeline_id)


def _found(connection: Connection, version: Version) -> Version:
    pipeline_id = _pipeline_id(connection, version.pipeline)
    if not pipeline_id:
        return version
    wanted = json.dumps({"predicates": [{"operation": EQUALS, "key": "name", "stringValue": version.name}]})
    listed = connection.pipelines.pipeline_service_list_pipeline_versions(pipeline_id, filter=wanted)
    found = next((each.pipeline_version_id for each in listed.pipeline_versions or ()), "")
    return replace(version, pipeline_id=pipeline_id, version_id=found)


def _pipeline_id(connection: Connection, name: str) -> str:
    """Empty where the server has no such pipeline."""
    for owned in [connection.owned, {}] if connection.namespace else [{}]:
        try:
            return str(connection.pipelines.pipeline_service_get_pipeline_by_name(name, **owned).pipeline_id)
        except ApiError as error:
            if error.status != 404:
                raise
    return ""


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
