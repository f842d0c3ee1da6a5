"""A round of the micro example for which all but the training is done, to be copied by tests that train."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from camopd import plan as layout
from camopd import workflow
from tests.integration.runs import ROOT, SMALL, command, environment

STEPS = 12  # updates of the round: enough to be stopped in their middle


def scored_run(output: Path) -> Path:
    """A run's folder, its first round rolled out, scored and selected."""
    wish = SMALL | {"steps_per_round": str(STEPS), "train.diagnose_every": "5", "num_threads": "1"}
    run_uri = workflow.prepare("micro", {**wish, "output": str(output)}).uri
    round_uri = layout.round_uri(run_uri, 1)
    for score_uri in workflow.rollout(round_uri).score_uris:
        workflow.score(score_uri)
    workflow.select(round_uri)
    return Path(run_uri)


def copied(run: Path, target: Path, **train: Any) -> str:
    """A copy of the run with other settings of ``train``. Returns the prefix of its round."""
    shutil.copytree(run, target)
    recipe = json.loads((target / "recipe.json").read_text())
    recipe["train"] |= train
    (target / "recipe.json").write_text(json.dumps(recipe))
    return layout.round_uri(str(target), 1)


def trained(round_uri: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """``camopd train`` in a process of its own."""
    return subprocess.run(command("train", round_uri), cwd=ROOT, env=environment(**extra), capture_output=True, text=True)


def pids_below(pid: int) -> set[int]:
    """All processes that a process has started, and those that they have."""
    found, waiting = set[int](), [pid]
    while waiting:
        above = waiting.pop()
        for task in Path(f"/proc/{above}/task").glob("*/children"):
            try:
                waiting += (new := [int(child) for child in task.read_text().split()])
            except OSError:
                continue
            found.update(new)
    return found


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
