"""The compiled pipeline by KFP's DockerRunner on the built images: the same weights as in processes, and no silent success."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import docker
import pytest
from kfp import compiler, dsl

from components import CORE, component
from pipelines.containers import LABEL, Folders, run_container, service
from pipelines.local import log_folder
from pipelines.runner import run_compiled
from tests.integration.runs import ROOT, the_run, weights
from tests.pipelines.conftest import small_recipe  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:Task .* have no effect", "ignore:You may be attemping to run")  # by KFP


def start(recipe: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    """Start `python -m pipelines.local` with an output and a database of its own."""
    arguments = [str(recipe), "--set", f"output={output}", "--set", "num_rounds=1", *flags]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{output}/mlflow.db", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipelines.local", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def containers(folder: str) -> list[str]:
    with service():
        client = docker.from_env()
        return [entry.name for entry in client.containers.list(all=True, filters={"label": f"{LABEL}={folder}"})]


@pytest.fixture
def anyone(tmp_path: Path) -> Path:
    """A folder that the containers' user may write and reach, which pytest's own is not."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o775)
    return tmp_path


def test_containers_make_the_same_weights_as_processes_and_promote(small_recipe, anyone):  # noqa: F811
    (anyone / "in").mkdir(mode=0o775)
    made = {}
    for kind, flags in {"containers": ["--containers"], "processes": []}.items():
        output = anyone / kind
        output.mkdir()
        output.chmod(0o775)
        with start(small_recipe, output, *flags) as process:
            text, _ = process.communicate()
        assert process.returncode == 0, text
        assert "Registry: camopd-recovered version 1" in text
        made[kind] = weights(the_run(str(output)))
    assert made["containers"] == made["processes"]
    assert containers(str(log_folder(the_run(str(anyone / "containers"))).resolve())) == []


def test_a_stopped_run_leaves_no_container(small_recipe, anyone):  # noqa: F811
    with start(small_recipe, anyone, "--containers") as process:
        deadline, mine = time.monotonic() + 120, []
        while not mine and time.monotonic() < deadline:
            runs = [path for path in anyone.glob("graph-*") if (path / "recipe.json").exists()]
            folder = str((ROOT / log_folder(str(runs[0]))).resolve()) if runs else ""
            mine = containers(folder) if folder else []
        assert mine, "no container was started"
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate()
    assert "Stopped. The same command goes on from here." in text
    assert containers(folder) == []


@component
def breaks() -> str:
    """Ends at once with an exit code that is not zero."""
    import os

    os._exit(3)


def test_a_container_that_ends_with_an_error_fails_the_run(anyone):
    compiled = anyone / "breaks.yaml"

    @dsl.pipeline
    def broken() -> None:
        breaks()

    compiler.Compiler().compile(broken, str(compiled))
    with pytest.raises(RuntimeError, match="breaks"):
        run_compiled({}, root=anyone / "kfp", compiled=compiled, containers=Folders(read=(), write=(str(anyone),)))


def test_exit_codes_and_words_arrive(capsys):
    with service():
        client = docker.from_env()
        for code in (0, 3):
            assert run_container(client, CORE, ["sh", "-c", f"echo last words; exit {code}"], network_mode="host") == code
        assert capsys.readouterr().out == "last words\n" * 2
        assert run_container(client, "nowhere/none:1", ["true"]) == 125
        assert run_container(client, CORE, ["no-such-program"], network_mode="host") == 125
    missing, unstarted = capsys.readouterr().out.splitlines()
    assert "no image nowhere/none:1 on this machine: `make images` builds it" in missing
    assert "no-such-program" in unstarted
