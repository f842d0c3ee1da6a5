"""Small recoveries of the micro example, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from camopd import plan as layout
from camopd.plan import Plan
from camopd.store import Manifest, Store

ROOT = Path(__file__).parents[2]
CAMOPD = Path(sys.executable).with_name("camopd")
SMALL = {
    "num_rounds": "2",
    "steps_per_round": "4",
    "rollout.prompts_per_step": "12",
    "evaluate.limit": "12",
    "evaluate.curve_points": "0",
    "evaluate.bootstrap": "200",
}


def command(verb: str, *arguments: str, program: Path = CAMOPD, **settings: str) -> list[str]:
    """``camopd <verb> ... --set key=value``."""
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [str(program), verb, *arguments, *pairs]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a shell without tracking, unless a test names a server."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    return kept | {"OMP_NUM_THREADS": "1"} | extra


def camopd(verb: str, *arguments: str, settings: dict[str, str] | None = None, program: Path = CAMOPD, **extra: str) -> str:
    """Run a verb in a process of its own and return what it printed. Raises with its messages when it fails.

    Args:
        verb: of the command line.
        arguments: positional ones and options.
        settings: by dotted key.
        program: the `camopd` of another environment.
        extra: environment variables.
    """
    whole = command(verb, *arguments, program=program, **(settings or {}))
    done = subprocess.run(whole, cwd=ROOT, env=environment(**extra), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def the_run(output: str) -> str:
    """The only run's prefix below a local output folder."""
    (found,) = (path for path in Path(output).iterdir() if (path / "recipe.json").exists())
    return str(found)


def checkpoints(run_uri: str, store: Store | None = None) -> list[Manifest]:
    """The manifest of each round's checkpoint."""
    store = store or Store()
    return [store.require(layout.checkpoint_uri(uri)) for uri in Plan.load(store, run_uri).rounds]


def weights(run_uri: str, store: Store | None = None) -> list[str]:
    """sha256 of each round's weights."""
    names = ("model.safetensors", "adapter_model.safetensors")
    return [file.sha256 for manifest in checkpoints(run_uri, store) for file in manifest.files if file.name in names]
