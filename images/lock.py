"""The lock of each image: ``python -m images.lock`` writes ``images/<image>/requirements*.txt`` again, without the network.

No resolver runs. constraints.txt and requirements-vllm.txt hold versions that were resolved and tested, and the packages
installed here say who needs whom: an image gets what its stages need, at the versions that the tests ran with. What CUDA's
builds of torch and vLLM need is in images/*-cuda.txt, which say how pip resolved them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HEAD = "# {what}\n# Made by `python -m images.lock` from {source}; installed with --no-deps, so this is all of it.\n"
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.2", "platform_system": "Linux", "sys_platform": "linux"}

# mlflow-skinny is MLflow's client without the server; with the other two it also opens sqlite:// and postgresql:// URIs.
CORE = ("camopd", "lm_eval", "kfp", "kfp-kubernetes", "mlflow-skinny", "sqlalchemy", "alembic")
TRAINER = (*CORE, "camopd[train,eval]")
# Beside vLLM: what evaluation needs, since it runs in the same pool. kfp's pins contradict vLLM's; alone it runs components.
EVALUATION = ("camopd[eval]", "mlflow-skinny", "sqlalchemy", "alembic")
TESTS_ONLY = {"hypothesis", "iniconfig", "pluggy", "pytest", "sortedcontainers"}
# What the two files leave to the environment, and where vLLM's choice is too new for MLflow (cachetools < 8).
BESIDE = {"setuptools": "setuptools==84.2.1"}
INFERENCE_FIRST = {"kfp": "kfp==2.17.3", "cachetools": "cachetools==7.3.3"}


def pins(path: Path) -> dict[str, str]:
    """The ``name==version`` lines of a file by canonical name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(line.partition("==")[0]): line for line in lines if line}


def closure(roots: Iterable[str]) -> set[str]:
    """Canonical names of everything that the roots need on Linux with Python 3.11, the roots included, camopd not.

    Raises:
        PackageNotFoundError: a package is not installed here, so nobody knows what it needs.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in ("", *wanted.extras):
            if (name, extra) in found:
                continue
            found.add((name, extra))
            if name == "camopd":
                lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
                waiting += map(Requirement, lines)
            else:
                needs = map(Requirement, requires(name) or ())
                waiting += [need for need in needs if need.marker is None or need.marker.evaluate({**PYTHON, "extra": extra})]
    return {name for name, _ in found} - {"camopd"}


def locked(names: Iterable[str], versions: Mapping[str, str]) -> str:
    """The lines of a lock, sorted. Raises KeyError with the first name that nothing pins."""
    return "".join(f"{versions[name]}\n" for name in sorted(names))


def locks() -> dict[Path, str]:
    """Each lock's path below the checkout and what it must hold."""
    tested = pins(ROOT / "constraints.txt") | BESIDE
    cpu = {"torch": tested["torch"] + "+cpu"}
    cuda, vllm_cuda = pins(ROOT / "images/torch-cuda.txt"), pins(ROOT / "images/vllm-cuda.txt")
    vllm = {name: line for name, line in pins(ROOT / "requirements-vllm.txt").items() if name not in TESTS_ONLY} | cpu
    one, two = "constraints.txt", "requirements-vllm.txt and constraints.txt"
    texts = {
        "core/requirements": ("No torch.", one, locked(closure(CORE), tested)),
        "trainer/requirements-cpu": ("torch for CPUs.", one, locked(closure(TRAINER), tested | cpu)),
        "trainer/requirements-cuda": (
            "torch for CUDA.",
            f"torch-cuda.txt and {one}",
            locked(closure(TRAINER) | cuda.keys(), tested | cuda),
        ),
        "inference/requirements-cpu": ("vLLM for CPUs, and what evaluation needs.", two, _beside(vllm, tested)),
        "inference/requirements-cuda": (
            "vLLM for CUDA, and what evaluation needs.",
            f"vllm-cuda.txt and {one}",
            _beside(vllm_cuda, tested),
        ),
    }
    return {
        Path("images", f"{name}.txt"): HEAD.format(what=what, source=source) + lines
        for name, (what, source, lines) in texts.items()
    }


def _beside(vllm: Mapping[str, str], tested: Mapping[str, str]) -> str:
    """vLLM's environment and what evaluation needs beside it; where both name a package, vLLM's version."""
    names = closure(EVALUATION) | vllm.keys() | INFERENCE_FIRST.keys()
    return locked(names, {**tested, **vllm, **INFERENCE_FIRST})


if __name__ == "__main__":
    for path, text in locks().items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(f"{path}: {text.count('==')} packages")
