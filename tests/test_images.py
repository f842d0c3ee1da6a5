"""What the images are made from, read as text. What is in the built ones: tests/images, by `make test-images`."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from images.build import DIGESTS, NAMES, local_paths, pinned, pip_settings, tag_of
from images.lock import closure, locks, pins

DOCKERFILES = {name: Path("images", name, "Dockerfile") for name in NAMES}
LOCKS = sorted(Path("images").glob("*/requirements*.txt"))
DIGEST = "sha256:" + "a" * 64


def instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile as (instruction, rest of its logical line)."""
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILES[name].read_text(encoding="utf-8")).replace("\\\n", " ")
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def values(name: str, word: str) -> list[str]:
    return [rest for instruction, rest in instructions(name) if instruction == word]


# --- Dockerfiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_dockerfile_names_a_base_itself(name):
    stages = [rest.partition(" AS ")[2] for rest in values(name, "FROM")]
    assert all(rest.partition(" AS ")[0] in ("${BASE}", "${VARIANT}", *stages) for rest in values(name, "FROM"))
    assert name != "inference" or {"cpu", "cuda"} < set(stages), "what VARIANT may be"
    assert values(name, "ARG")[0] == "BASE", "declared before the first FROM, and without a default"


@pytest.mark.parametrize("name", NAMES)
def test_the_user_is_a_number_and_not_root(name):
    words = [word for word, _ in instructions(name)]
    assert values(name, "USER") == ["1001:0"]
    assert not {"RUN", "COPY"} & set(words[words.index("USER") :]), "nothing is written after it"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_fetched_but_packages_of_the_lock(name):
    assert not {"ADD", "ENTRYPOINT", "SHELL", "VOLUME"} & {word for word, _ in instructions(name)}
    for command in values(name, "RUN"):
        assert not re.search(r"\b(curl|wget|git|sudo|chmod|chown|sh -c)\b|\|", command)
    installs = [
        part for command in values(name, "RUN") for part in command.split("&&") if "/pip " in part and " install " in part
    ]
    assert len(installs) == 3
    assert all("--no-deps" in part or "--requirement /build/build.txt" in part for part in installs)
    assert ":latest" not in DOCKERFILES[name].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_is_there_and_in_the_build_context(name):
    allowed = [line[1:] for line in Path(".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")]
    for rest in values(name, "COPY"):
        if rest.startswith("--from="):
            continue
        for source in rest.replace("${VARIANT}", "cpu").split()[:-1]:
            assert Path(source).exists(), source
            assert any(Path(source).match(pattern) for pattern in allowed), f"{source} is kept out by .dockerignore"


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_written_is_written_below_tmp(name):
    environment = dict(pair.split("=", 1) for rest in values(name, "ENV") for pair in rest.split())
    places = {key: value for key, value in environment.items() if "/" in value and key != "PATH"}
    assert all(value == "/tmp" or value.startswith("/tmp/") for value in places.values())
    wanted = {"HOME", "HF_HOME", "XDG_CACHE_HOME", "CAMOPD_CACHE"}
    if name != "core":
        wanted |= {"MPLCONFIGDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    if name == "inference":
        wanted.add("VLLM_CACHE_ROOT")
        assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert places.keys() == wanted
    assert environment["HF_HUB_OFFLINE"] == environment["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("name", NAMES)
def test_a_change_in_the_source_comes_after_all_that_is_large(name):
    stages = "\n".join(f"{word} {rest}" for word, rest in instructions(name)).split("FROM ")
    packages, package, last = stages[2], stages[3], stages[-1]
    assert "COPY src" not in packages
    assert "COPY src" in package
    copied = re.findall(r"COPY (.*)", last)
    assert "COPY" not in "".join(stages[4:-1])
    assert (copied[0], copied[-1]) == ("--from=packages /opt/camopd /opt/camopd", "--from=package /package /")


@pytest.mark.parametrize("name", NAMES)
def test_labels_say_what_it_is(name):
    (labels,) = values(name, "LABEL")
    keys = re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", labels)
    assert sorted(keys) == ["licenses", "source", "title"], "the others are known when it is built"
    assert f'title="camopd {name}"' in labels


def test_the_compiled_pipeline_asks_for_images_that_are_built():
    asked = set(re.findall(r"image: (\S+)", Path("pipelines/recovery.yaml").read_text(encoding="utf-8")))
    assert asked == {tag_of("core"), tag_of("trainer")}
    example = tomllib.loads(Path("pipelines/pools.example.toml").read_text(encoding="utf-8"))
    assert example["inference"]["image"] == tag_of("inference")


# --- The base -------------------------------------------------------------------------------------------------------------


def test_the_base_is_named_in_one_place_and_by_digest():
    base = tomllib.loads(DIGESTS.read_text(encoding="utf-8"))
    assert base.keys() == {"name", "tag", "digest"}
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", base["digest"])
    others = [path for path in Path("images").rglob("*") if path.is_file() and path != Path("images/digests.toml")]
    named = [path for path in others if path.suffix != ".pyc" and base["name"] in path.read_text(encoding="utf-8")]
    assert named == []


def test_a_pinned_base_is_asked_for_by_digest():
    text = f'name = "docker.io/library/python"\ntag = "3.11-slim"\ndigest = "{DIGEST}"\n'
    assert pinned(text) == f"docker.io/library/python:3.11-slim@{DIGEST}"


# --- Locks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LOCKS, ids=str)
def test_every_package_has_an_exact_version(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+]*", line) for line in lines)
    assert len(pins(path)) == len(lines), "no package twice"


def test_the_locks_are_fresh():
    for path, text in locks().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is stale: python -m images.lock"


def test_what_a_package_needs_is_followed_to_the_end():
    assert closure(["boto3"]) == {"boto3", "botocore", "jmespath", "python-dateutil", "s3transfer", "six", "urllib3"}
    assert {"torch", "lm-eval"} & closure(["camopd"]) == set()
    assert {"torch", "peft"} <= closure(["camopd[eval]"]), "extras of extras: lm-eval[hf]"


def test_the_core_has_no_torch_and_the_trainer_has_all_of_the_core():
    core, trainer = pins(Path("images/core/requirements.txt")), pins(Path("images/trainer/requirements-cpu.txt"))
    assert core.items() < trainer.items()
    assert {"torch", "peft", "accelerate", "matplotlib"} <= trainer.keys() - core.keys()


def test_the_cuda_locks_differ_by_what_cuda_brings():
    cpu, cuda = (pins(Path(f"images/trainer/requirements-{variant}.txt")) for variant in ("cpu", "cuda"))
    assert {name for name in cpu if cpu[name] != cuda[name]} == {"torch"}
    assert all(name.startswith(("cuda-", "nvidia-", "triton")) for name in cuda.keys() - cpu.keys())
    inference = pins(Path("images/inference/requirements-cuda.txt"))
    assert inference["torch"] == cuda["torch"]
    assert {"vllm", "flashinfer-python", "lm-eval", "nvidia-nccl-cu13"} <= inference.keys()


def test_components_run_with_the_kfp_that_compiled_them():
    assert {pins(path)["kfp"] for path in LOCKS} == {pins(Path("constraints.txt"))["kfp"]}


# --- Building -------------------------------------------------------------------------------------------------------------


def test_the_build_takes_packages_from_where_this_machine_does(tmp_path):
    listing = (
        ":env:.cert='/etc/ssl/certs/ours.crt'\n:env:.disable-pip-version-check='1'\nglobal.cert='/nowhere.crt'\n"
        f"global.extra-index-url='file://{tmp_path}/simple https://user:secret@index.example/simple'\n"
        f"global.find-links='{tmp_path}'\nuser.name='x'\n"
    )
    settings = pip_settings(listing)
    assert settings.keys() == {"cert", "extra-index-url", "find-links"}
    assert settings["cert"] == "/etc/ssl/certs/ours.crt", "the environment goes before files"
    assert local_paths(settings) == [str(tmp_path)], "a file:// index needs the folder above it"


def test_lightweight_components_need_a_shell_and_python_only():
    """KFP starts them by `sh -ec ... python3 -m kfp.dsl.executor_main`, so the images need no entry point of their own."""
    for name in NAMES:
        assert json.loads(values(name, "CMD")[0]) == ["camopd", "--help"]
