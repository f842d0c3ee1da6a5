"""What the gradient diagnostics cost: their share of a recovery's processor seconds, on the micro example, one thread.

    python benchmarks/diagnostics.py        # two minutes; writes benchmarks/results/diagnostics.md

Two settings: the micro recipe's (batches of 96, a look every 48 updates), and the defaults' (batches of 512, a look every 8).
A run is `camopd recover`'s own step, without checkpoints and evaluation, so the share of a whole recovery is smaller still.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from page import machine, table

from camopd import prepare, train
from camopd.config import load_recipe
from camopd.recover import Session
from camopd.store import Store

RESULTS = Path(__file__).with_name("results") / "diagnostics.md"
SETTINGS = {"`recipes/micro.toml`": (96, 48, 96), "the defaults": (512, 8, 16)}  # prompts a step, look every, updates
AIM = 0.05


def share(prompts: int, every: int, updates: int, seed: int) -> tuple[float, float]:
    """Milliseconds of a look, and its share of all processor seconds of a run of so many updates, after a cycle to warm up."""
    parameters = {"rollout.prompts_per_step": prompts, "train.diagnose_every": every, "seed": seed, "execution": "colocated"}
    looks: list[float] = []
    measure = train.measure

    def timed(*arguments: Any) -> dict[str, float | str]:
        begun = time.process_time()
        found = measure(*arguments)
        looks.append(time.process_time() - begun)
        return found

    store = Store()
    with tempfile.TemporaryDirectory(prefix="camopd-diagnostics-") as output:
        plan = prepare.run(load_recipe("micro", {**parameters, "output": output}), store=store)
        session = Session(plan, 1, store)
        train.measure = timed
        try:
            for _ in range(every):
                session.step()
            looks.clear()
            begun = time.process_time()
            for _ in range(updates):
                session.step()
            whole = time.process_time() - begun
        finally:
            train.measure = measure
    return 1000 * statistics.mean(looks), sum(looks) / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    rows = []
    for name, (prompts, every, updates) in SETTINGS.items():
        looks, shares = zip(*(share(prompts, every, updates, seed) for seed in seeds), strict=True)
        numbers = (f"{100 * value:.2f} %" for value in (statistics.median(shares), min(shares), max(shares)))
        rows.append([name, str(prompts), str(every), f"{statistics.median(looks):.0f}", *numbers])
    header = ["settings", "prompts a step", "a look every", "ms a look", "share of the time", "least", "greatest"]
    text = "\n\n".join(
        [
            "# The diagnostics' share of the time",
            f"`python benchmarks/diagnostics.py --seeds {' '.join(map(str, seeds))}`, {machine(note='one thread')}. "
            "Processor seconds; medians over the seeds.",
            table(header, rows),
            f"Aim: under {AIM:.0%}.",
        ]
    )
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
