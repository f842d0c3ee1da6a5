"""The compiled pipeline in containers of the real images, by KFP's DockerRunner: ``pipelines.local --containers``.

What a cluster would demand is asked for here, too: a user without an entry in /etc/passwd, a read-only root, no capability.
A container sees the folders that the recipe names, at the same paths, and writes only below those of the run.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camopd.errors import CamopdError
from camopd.store import is_s3

if TYPE_CHECKING:
    from docker import DockerClient
    from kfp import local

    from camopd.config import Recipe

PASSED = ("AWS_", "CAMOPD_PROGRESS", "MLFLOW_", "OMP_NUM_THREADS")  # beginnings of what stages read of the environment
LABEL = "camopd.folder"
NOT_STARTED = 125
PATIENCE = 600  # seconds for an answer of the engine; while it commits an image of gigabytes, it gives none
# Root in group 0, as OpenShift's pods are members of it; another user keeps his numbers, so that his files are his.
USER = f"{os.getuid()}:{os.getgid()}" if os.getuid() else "1234567:0"
CONTAINERS_CONF = Path(__file__).parents[1] / "images/containers.conf"


@dataclass(frozen=True)
class Folders:
    """What a container sees of this machine.

    Attributes:
        read: files and folders.
        write: folders, the first one KFP's own and the name of the run for ``clean_up``.
    """

    read: tuple[str, ...]
    write: tuple[str, ...]

    def volumes(self) -> dict[str, dict[str, str]]:
        """As the docker library wants them; what lies in a folder that is mounted anyway is there already."""
        modes = dict.fromkeys(self.read, "ro") | dict.fromkeys(self.write, "rw")
        return {path: {"bind": path, "mode": mode} for path, mode in sorted(modes.items())}


def folders_of(recipe: Recipe, source: str, tracking_uri: str, folder: Path) -> Folders:
    """Every local place that a recipe, its source and the tracking URI name.

    Args:
        recipe: with absolute locations.
        source: what it was loaded from; a path, or else nothing that must be mounted.
        tracking_uri: MLflow's; the folder of a sqlite file is written to.
        folder: of KFP's artifacts and the progress lines.
    """
    places = [source, recipe.student, recipe.prompts.chat_template, recipe.evaluate.task_dir]
    places += [place for branch in recipe.branches for place in (branch.teacher, branch.prompts)]
    read = {str(Path(place).resolve()) for place in places if place and not is_s3(place) and Path(place).exists()}
    write = [str(folder.resolve())] + ([] if is_s3(recipe.output) else [recipe.output])
    if database := _database(tracking_uri):
        write.append(str(database.parent))
    return Folders(tuple(sorted(read)), tuple(dict.fromkeys(write)))


def _database(tracking_uri: str) -> Path | None:
    """The file of a sqlite URI."""
    path = tracking_uri.removeprefix("sqlite:///")
    return None if path == tracking_uri else Path(path).resolve()


def share_database(tracking_uri: str) -> None:
    """Let our group write MLflow's sqlite file, which sqlite makes for its owner alone, whatever the umask."""
    if database := _database(tracking_uri):
        database.chmod(0o664)


def absolute_form(recipe: str, form: Mapping[str, str | bool]) -> tuple[str, dict[str, str | bool]]:
    """Recipe and run form with absolute paths: a container's working folder is another than ours."""
    source = str(Path(recipe).resolve()) if Path(recipe).exists() else recipe
    local_uris = {key: str(uri) for key, uri in form.items() if key.endswith("_uri") and not is_s3(str(uri))}
    return source, {**form, **{key: os.path.abspath(uri) for key, uri in local_uris.items()}}


# --- Running --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def service() -> Iterator[None]:
    """A Docker-compatible service at DOCKER_HOST: the one that is set, else podman's, started here."""
    if "DOCKER_HOST" in os.environ:
        yield
        return
    environment = ({"CONTAINERS_CONF": str(CONTAINERS_CONF)} if os.getuid() == 0 else {}) | os.environ
    with tempfile.TemporaryDirectory(prefix="camopd-") as folder:
        socket = Path(folder, "podman.sock")
        command = ["podman", "system", "service", "--time=60", f"unix://{socket}"]  # seconds without a client, then it ends
        try:
            process = subprocess.Popen(command, env=environment, start_new_session=True)
        except FileNotFoundError:
            raise CamopdError("podman is not installed: `make images` installs it, or set DOCKER_HOST to Docker's") from None
        try:
            while not socket.exists() and process.poll() is None:
                time.sleep(0.05)
            os.environ["DOCKER_HOST"] = f"unix://{socket}"
            yield
        finally:
            os.environ.pop("DOCKER_HOST", None)
            process.terminate()
            process.wait()


@contextlib.contextmanager
def docker_runner(folders: Folders) -> Iterator[local.DockerRunner]:
    """A runner for KFP's local execution that starts each task in a container of its image.

    kfp 2.17.3 removes a container when it ends, and takes one that is gone before its exit code was read for a success. So the
    one function of it that runs a container is replaced by ``run_container``.
    """
    import docker
    from kfp import local
    from kfp.local import docker_task_handler

    def run(client: DockerClient, image: str, command: Sequence[str], volumes: Mapping[str, Any], **arguments: Any) -> int:
        for path in volumes:  # else the engine makes it, for root alone
            Path(path).mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
        arguments["environment"] = environment | arguments.get("environment", {})
        return run_container(client, image, command, volumes={**volumes, **folders.volumes()}, **arguments)

    docker_task_handler.run_docker_container = run
    docker.from_env = functools.partial(docker.DockerClient.from_env, timeout=PATIENCE)  # kfp's clients, too
    os.umask(0o002)  # folders made here are written by the group of the containers' user
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raised where it waits, so that the container is removed
    with service():
        clean_up(docker.from_env(), folders)
        yield local.DockerRunner(
            user=USER,
            read_only=True,
            tmpfs={"/tmp": "mode=1777"},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            network_mode="host",
            labels={LABEL: folders.write[0]},
        )


def run_container(client: DockerClient, image: str, command: Sequence[str], **arguments: Any) -> int:
    """Run a container to its end, with its messages on our standard output, and return its exit code.

    125, as from the command line, when it could not be started; the reason is then the message.
    """
    from docker.errors import APIError, ImageNotFound

    try:
        container = client.containers.create(image, command, **arguments)
    except ImageNotFound:
        print(f"There is no image {image} on this machine: `make images` builds it.")
        return NOT_STARTED
    try:
        container.start()
        for part in container.logs(stream=True, follow=True):
            print(part.decode(errors="replace"), end="", flush=True)
        return int(container.wait()["StatusCode"])
    except APIError as error:
        print(f"The container of {image} does not run: {error.explanation}")
        return NOT_STARTED
    finally:
        container.remove(force=True)


def clean_up(client: DockerClient, folders: Folders) -> None:
    """Remove what a killed run of the same folder has left at work: two must not write the same prefixes."""
    for container in client.containers.list(all=True, filters={"label": f"{LABEL}={folders.write[0]}"}):
        container.remove(force=True)
