"""The README's table: the demo over several seeds, through the compiled pipeline, from nothing.

    python benchmarks/micro_seeds.py --seeds 1 2 3     # writes benchmarks/results/micro_seeds.md

Every number comes from the runs' own evaluation.json and manifests; the wall time is the demo's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from page import machine, table

from camopd import plan as layout
from camopd.evaluate import evaluation_uri
from camopd.plan import Plan
from camopd.store import Store, join

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "micro_seeds.md"


def run_demo(recipe: str, seed: int, output: str) -> tuple[float, Plan]:
    """Run the demo into a fresh folder; wall seconds and the run's plan."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "pipelines.local", recipe, "--set", f"seed={seed}", "--set", f"output_uri={output}"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{output}/mlflow.db"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (run_uri,) = (str(path.parent) for path in Path(output).glob("*/recipe.json"))
    return time.monotonic() - begun, Plan.load(Store(), run_uri)


def stage_seconds(plan: Plan, store: Store) -> dict[str, float]:
    """Seconds of each stage over all rounds, from the manifests (process starts are not in them)."""
    seconds: dict[str, float] = {"prepare": store.require(layout.plan_uri(plan.run_uri)).seconds}
    for uri in plan.rounds:
        parts = {"rollout": layout.rollout_uri(uri), "select": layout.select_uri(uri), "train": layout.checkpoint_uri(uri)}
        parts |= {f"score {branch.name}": layout.score_uri(uri, branch.name) for branch in plan.recipe.branches}
        for stage, prefix in parts.items():
            seconds[stage] = seconds.get(stage, 0) + store.require(prefix).seconds
    return seconds | {"evaluate": store.require(evaluation_uri(plan, store)).seconds}


def cell(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def row(seed: int, evaluation: Mapping[str, Any], wall: float) -> list[str]:
    scores = {key: score["branches"] for key, score in evaluation["scores"].items()}
    tasks = evaluation["scores"]["after"]["tasks"]
    return [
        str(seed),
        f"{scores['teacher-general']['general']['value']:.3f}",
        f"{scores['before']['general']['value']:.3f}",
        cell(scores["after"]["general"]),
        f"{tasks['micro_seen']['value']:.3f} / {tasks['micro_unseen']['value']:.3f}",
        f"{scores['before']['domain']['value']:.3f}",
        cell(scores["after"]["domain"]),
        cell(evaluation["recovered"]["general"]),
        cell(evaluation["retained"]["domain"]),
        "yes" if evaluation["decision"]["passed"] else "no",
        f"{wall:.0f} s",
    ]


HEADER = [
    "seed", "general teacher", "general before", "general after", "seen / unseen kinds after", "domain before", "domain after",
    "recovered share", "retained share", "gate", "wall time",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default="recipes/micro.toml")
    arguments = parser.parse_args()
    store, rows, times = Store(), [], []
    shares: dict[str, list[float]] = {"recovered": [], "retained": []}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory(prefix="camopd-seeds-") as output:
            wall, plan = run_demo(arguments.recipe, seed, output)
            evaluation = json.loads(store.read(join(evaluation_uri(plan, store), "evaluation.json")))
            rows.append(row(seed, evaluation, wall))
            times.append(stage_seconds(plan, store))
            shares["recovered"].append(evaluation["recovered"]["general"]["value"])
            shares["retained"].append(evaluation["retained"]["domain"]["value"])
    spread = [f"{name} share: mean {statistics.mean(v):.3f}, {min(v):.3f} to {max(v):.3f}" for name, v in shares.items()]
    medians = [[stage, f"{statistics.median(t[stage] for t in times):.1f}"] for stage in times[0]]
    text = "\n\n".join(
        [
            "# The micro example over seeds",
            f"`python benchmarks/micro_seeds.py --seeds {' '.join(map(str, arguments.seeds))}`, "
            f"{machine('kfp', 'mlflow', 'lm-eval')}. Intervals are 95 %, paired bootstrap by sample.",
            table(HEADER, rows),
            "Over the seeds: " + "; ".join(spread) + ".",
            "Seconds by stage, all rounds together, median over the seeds (process starts and tracking come on top):",
            table(["stage", "seconds"], medians),
        ]
    )
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
