"""Build the images: ``python -m images.build [core trainer inference] [--base IMAGE] [--variant cpu|cuda] [--engine docker]``.

Which base: the pinned one of digests.toml, or what ``--base`` gives; ``--base debootstrap`` makes one here, without a registry.
Packages come from where this machine's pip takes them, and none of its settings stays in an image.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from camopd import __version__

ROOT = Path(__file__).parents[1]
DIGESTS = ROOT / "images/digests.toml"
NAMES = ("core", "trainer", "inference")
DEBOOTSTRAP = "debootstrap"  # as a base: make it here
BOOTSTRAPPED = "localhost/camopd-base:bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"  # of the base; venv brings the pip that the build starts with
PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "client-cert", "proxy", "timeout")


def tag_of(name: str) -> str:
    """The name under which the compiled pipeline asks for an image."""
    return f"ghcr.io/camopd/{name}:{__version__}"


def engine_environment(engine: str) -> dict[str, str]:
    """Podman as root gets settings that work without systemd, unless the user has his own."""
    own = {"CONTAINERS_CONF": str(ROOT / "images/containers.conf")} if engine == "podman" and os.geteuid() == 0 else {}
    return {**own, **os.environ}


def run(engine: str, *arguments: str) -> str:
    """What a command of the engine prints. Raises CalledProcessError; its messages go to our standard error."""
    done = subprocess.run([engine, *arguments], env=engine_environment(engine), stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


# --- The base -------------------------------------------------------------------------------------------------------------


def pinned(text: str) -> str:
    """``name:tag@digest`` of a digests.toml."""
    base = tomllib.loads(text)
    return f"{base['name']}:{base['tag']}@{base['digest']}"


def pull(engine: str, base: str) -> str:
    """Have the pinned base on this machine; the engine compares what arrives with the digest.

    Raises:
        SystemExit: there is no such image, or no registry; the engine's message comes before.
    """
    try:
        run(engine, "pull", "--quiet", base)
    except subprocess.CalledProcessError:
        raise SystemExit(
            f"The base {base} could not be pulled. No registry here: BASE={DEBOOTSTRAP} makes one from Debian's packages, "
            f"BASE=IMAGE takes yours. Digest refused: `python -m images.build --pin` renews it in {DIGESTS.relative_to(ROOT)}."
        ) from None
    return base


def pin(engine: str, path: Path = DIGESTS) -> str:
    """Ask the registry what the tag means today, write its digest into the file, and return it."""
    text = path.read_text(encoding="utf-8")
    base = tomllib.loads(text)
    name = f"{base['name']}:{base['tag']}"
    run(engine, "pull", "--quiet", name)
    digests = json.loads(run(engine, "image", "inspect", "--format", "{{json .RepoDigests}}", name))
    digest = next(entry.partition("@")[2] for entry in digests if entry.startswith(base["name"] + "@"))
    path.write_text(re.sub(r'(?m)^digest = ".*"$', f'digest = "{digest}"', text), encoding="utf-8")
    return digest


def bootstrap(engine: str) -> str:
    """Make the base from Debian's packages, once a machine. Raises SystemExit when not root."""
    if run(engine, "images", "--quiet", BOOTSTRAPPED):
        return BOOTSTRAPPED
    if os.geteuid() != 0:
        raise SystemExit("debootstrap needs root: run this as root, or leave BASE away to pull the pinned base.")
    with tempfile.TemporaryDirectory() as folder:
        print(f"Making {BOOTSTRAPPED} with debootstrap ...", flush=True)
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", folder]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        caches = ["--exclude=./var/cache/apt/*", "--exclude=./var/lib/apt/lists/*"]
        with subprocess.Popen(["tar", "-C", folder, "-c", *caches, "."], stdout=subprocess.PIPE) as archive:
            subprocess.run(
                [engine, "import", "-", BOOTSTRAPPED], env=engine_environment(engine), stdin=archive.stdout, check=True
            )
    return BOOTSTRAPPED


# --- The images -----------------------------------------------------------------------------------------------------------


def pip_settings(listing: str) -> dict[str, str]:
    """What ``pip config list`` says of where packages come from; the environment goes before files, as for pip itself."""
    found = re.findall(r"^(global|install|:env:)\.(\S+?)='(.*)'$", listing, re.MULTILINE)
    pairs = {name: value for _, name, value in sorted(found, key=lambda entry: entry[0] == ":env:")}
    return {name: value.replace("\\n", " ") for name, value in pairs.items() if name in PIP_SETTINGS}


def local_paths(settings: Mapping[str, str]) -> list[str]:
    """Folders and files of this machine that the settings name; of a file:// index the folder above, where its files lie."""
    words = {word for value in settings.values() for word in value.split()}
    paths = {str(Path(word.removeprefix("file://")).parent) if word.startswith("file://") else word for word in words}
    return sorted(path for path in paths if path.startswith("/") and Path(path).exists())


def revision() -> str:
    """The commit, with ``-dirty`` where the checkout differs from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--match="]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def build(name: str, base: str, *, variant: str, engine: str) -> None:
    """Build an image under the name of ``tag_of``; the builder's messages go to standard error."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = pip_settings(listing)
    base_name, _, digest = base.partition("@")
    labels = {"version": __version__, "revision": revision(), "base.name": base_name, "base.digest": digest}
    arguments = {"BASE": base, "REVISION": labels["revision"]} | ({} if name == "core" else {"VARIANT": variant})
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as conf:
        conf.write("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
        conf.flush()
        command = [engine, "build", f"--file=images/{name}/Dockerfile", f"--tag={tag_of(name)}"]
        command += [f"--secret=id=pip,src={conf.name}"]
        if engine == "podman":  # Docker's builder sees no folder of this machine: there, an index must be a URL
            command += [f"--volume={path}:{path}:ro" for path in local_paths(settings)]
        command += [f"--build-arg={key}={value}" for key, value in arguments.items()]
        command += [f"--label=org.opencontainers.image.{key}={value}" for key, value in labels.items()]
        subprocess.run([*command, "."], cwd=ROOT, env=engine_environment(engine), stdout=sys.stderr, check=True)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="core, trainer, inference; all without a name.")] = None,
    base: Annotated[str, typer.Option(help="Image with Python 3.11 and venv, or debootstrap; else digests.toml's.")] = "",
    variant: Annotated[str, typer.Option(help="Build of torch and vLLM: cpu or cuda.")] = "cpu",
    engine: Annotated[str, typer.Option(help="podman or docker.")] = "podman",
    pin_base: Annotated[bool, typer.Option("--pin", help="Write the base's digest into digests.toml, build nothing.")] = False,
) -> None:
    """Build the images and print their sizes."""
    if pin_base:
        print(pin(engine))
        return
    chosen = bootstrap(engine) if base == DEBOOTSTRAP else base or pull(engine, pinned(DIGESTS.read_text(encoding="utf-8")))
    table = Table("image", "MB", "built in", title=f"{variant}, {revision()[:12]}, base {chosen}")
    for name in names or NAMES:
        begun = time.monotonic()
        build(name, chosen, variant=variant, engine=engine)
        size = int(run(engine, "image", "inspect", "--format", "{{.Size}}", tag_of(name)))
        table.add_row(tag_of(name), f"{size / 1e6:,.0f}", f"{time.monotonic() - begun:.0f} s")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
