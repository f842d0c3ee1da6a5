"""Ours against TRL's on-policy distillation and against a bare torch loop, on the micro example, on one thread.

    python benchmarks/against_trl.py            # under ten minutes; writes benchmarks/results/against_trl.md

Two questions. *Same work*: TRL, the bare loop and ours train on the general prompts alone, in turns of a few updates, so that
whatever else the machine does falls on all of them; a ratio compares neighbouring turns. TRL takes one teacher, so ours runs
`general-only` with TRL's signal, the reverse KL over the whole vocabulary. *Time to quality*: seconds of training until the
general score is 0.5 with the domain at 0.97 or more, the bare loop alternating G, G, G, D and ours by the recipe's own method.
Loading, the first turn of the same work, evaluating and saving are outside the clock.

TRL gets an environment of its own (.cache/trl-venv, made at the first run, about a gigabyte): no dependency of the project.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from page import machine, table

from camopd.config import load_recipe

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "against_trl.md"
MICRO = ROOT / "examples" / "micro"
RECIPE = ROOT / "recipes" / "micro.toml"
TRL, TORCH, OURS = "TRL", "bare torch loop", "camopd"
SCRIPTS = {TRL: "with_trl.py", TORCH: "with_torch.py", OURS: "with_camopd.py"}
TRL_PACKAGES = ("trl==1.16.0", f"torch=={version('torch').split('+')[0]}")
CLOCKS = ("seconds", "processor_seconds")
GENERAL, DOMAIN = 0.5, 0.97  # the quality that is waited for
QUIET = {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "CAMOPD_PROGRESS": os.devnull}
TASKS = {"general": ("micro_seen", "micro_unseen"), "domain": ("micro_domain",)}


# --- TRL's environment ------------------------------------------------------------------------------------------------------


def trl_python(venv: Path) -> Path:
    """Python of TRL's environment, made when it is not there or was left half made; our own pins for what both need."""
    python, ready = venv / "bin" / "python", venv / ".ready"
    if not ready.exists() or ready.read_text() != " ".join(TRL_PACKAGES):
        print(f"Installing {' and '.join(TRL_PACKAGES)} into {venv} (about two minutes) ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        install = [
            python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--quiet",
            "install",
            "--constraint",
            ROOT / "constraints.txt",
        ]
        subprocess.run([*install, *TRL_PACKAGES], check=True)
        ready.write_text(" ".join(TRL_PACKAGES))
    return python


# --- Contestants ------------------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """A training in a process of its own (see benchmarks/trl/turns.py), and what it took so far."""

    name: str
    process: subprocess.Popen[str]
    turns: list[dict[str, float]] = field(default_factory=list)

    def ask(self, **command: Any) -> dict[str, float]:
        """Give a command and wait for its answer. Raises RuntimeError when the contestant ended instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(command), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}; its own words stand above")
        return json.loads(answer)

    def train(self, updates: int) -> None:
        self.turns.append(self.ask(updates=updates))

    def total(self, key: str) -> float:
        """Sum over all its turns so far."""
        return sum(turn[key] for turn in self.turns)


@contextlib.contextmanager
def contestants(jobs: Mapping[str, Mapping[str, Any]], python: Mapping[str, Path]) -> Iterator[list[Contestant]]:
    """The named contestants, started, with one job each; ended afterwards."""
    environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = []
    for name, job in jobs.items():
        command = [python.get(name, Path(sys.executable)), HERE / "trl" / SCRIPTS[name], json.dumps(job)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=None, text=True, env=environment, cwd=ROOT)
        started.append(Contestant(name, process))
    try:
        yield started
    finally:
        for contestant in started:
            contestant.process.communicate()  # the end of its input ends it


def make_job(*, seed: int, cycle: Sequence[int], rollouts: int, **ours: Any) -> dict[str, Any]:
    """What all contestants train with, read from the recipe so that nothing can differ.

    Args:
        seed: of sampling and prompt order.
        cycle: index of the branch at each step, for the bare loop.
        rollouts: prompts a step, one response each.
        ours: what camopd's own recipe says on top.
    """
    parameters = {"seed": seed, "execution": "colocated", "rollout.prompts_per_step": rollouts, **ours}
    recipe = load_recipe(RECIPE, parameters)
    return {
        "student": recipe.student,
        "branches": [{"prompts": branch.prompts, "teacher": recipe.teacher(branch)} for branch in recipe.branches],
        "cycle": list(cycle),
        "prompts_per_step": rollouts,
        "max_new_tokens": recipe.rollout.max_new_tokens,
        "learning_rate": recipe.train.learning_rate,
        "betas": [recipe.train.beta1, recipe.train.beta2],
        "weight_decay": recipe.train.weight_decay,
        "max_grad_norm": recipe.train.max_grad_norm,
        "seed": seed,
        "recipe": str(RECIPE),
        "parameters": parameters,
    }


# --- Accuracy ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def examiner() -> Iterator[Any]:
    """A function from a contestant to its student's scores: greedy exact match, a branch's score the mean of its tasks'."""
    import torch
    from transformers import AutoTokenizer

    from camopd.engines.transformers import load_model
    from camopd.evaluation.harness import Harness, open_tasks, quiet

    torch.set_num_threads(1)
    names = [task for tasks in TASKS.values() for task in tasks]
    with open_tasks(names, MICRO / "tasks", seed=0) as tasks, tempfile.TemporaryDirectory() as scratch:
        harness = Harness(tasks=tasks, tokenizer=AutoTokenizer.from_pretrained(MICRO / "domain"), batch_size=256)

        def examine(contestant: Contestant) -> dict[str, float]:
            contestant.ask(save=scratch)
            with quiet():
                model = load_model(Path(scratch))
            scores = {task: statistics.mean(answer.score for answer in given) for task, given in harness.evaluate(model)}
            return {branch: statistics.mean(scores[task] for task in own) for branch, own in TASKS.items()}

        yield examine


# --- The two questions ------------------------------------------------------------------------------------------------------


def same_work(examine: Any, python: Mapping[str, Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """General prompts alone, in turns: one row a seed and contestant, with its turns (the first left out) and scores."""
    rows = []
    for seed in options.seeds:
        # TRL has no such diagnostics.
        ours = {"method": "general-only", "score.signal": "full", "train.diagnose_every": 0}
        job = make_job(seed=seed, cycle=[0], rollouts=options.rollouts, **ours)
        with contestants(dict.fromkeys((TRL, TORCH, OURS), job), python) as runners:
            for turn in range(options.updates // options.turn):
                for runner in runners:
                    runner.train(options.turn)
                print(f"same work, seed {seed}: {(turn + 1) * options.turn}/{options.updates} updates", file=sys.stderr)
            rows += [
                {"seed": seed, "name": runner.name, "turns": runner.turns[1:], "scores": examine(runner)} for runner in runners
            ]
    return rows


def time_to_quality(examine: Any, python: Mapping[str, Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both branches: one row a seed and contestant with seconds and updates to the quality, or without when it never came."""
    rows = []
    for seed in options.seeds:
        job = make_job(seed=seed, cycle=[0, 0, 0, 1], rollouts=options.rollouts)
        with contestants(dict.fromkeys((TORCH, OURS), job), python) as runners:
            waiting = list(runners)
            while waiting:
                for runner in list(waiting):
                    runner.train(options.look)
                    scores, updates = examine(runner), len(runner.turns) * options.look
                    reached = scores["general"] >= GENERAL and scores["domain"] >= DOMAIN
                    print(f"time to quality, seed {seed}, {runner.name}, {updates} updates: {scores}", file=sys.stderr)
                    if reached or updates >= options.limit:
                        waiting.remove(runner)
                        end = {key: runner.total(key) for key in CLOCKS}
                        end |= {"updates": updates, "reached": reached, "scores": scores}
                        rows.append({"seed": seed, "name": runner.name, **end})
    return rows


# --- Report -----------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """``0.131 (0.120 to 0.150)``: median, least and greatest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(rows: Sequence[Mapping[str, Any]], other: str, key: str) -> list[float]:
    """Ours over the other's, turn by turn: each pair stood next to each other in time."""
    turns = {name: [turn[key] for row in rows if row["name"] == name for turn in row["turns"]] for name in (OURS, other)}
    return [ours / theirs for ours, theirs in zip(turns[OURS], turns[other], strict=True)]


def same_work_text(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> list[str]:
    def line(name: str) -> list[str]:
        own = [row for row in rows if row["name"] == name]
        turns = [turn for row in own for turn in row["turns"]]
        return [
            name,
            *(spread([turn[key] / options.turn for turn in turns], 4) for key in CLOCKS),
            *(f"{max(turn[key] for turn in turns):.0f}" for key in ("peak_mib", "loaded_mib")),
            *(spread([row["scores"][branch] for row in own], 3) for branch in TASKS),
        ]

    header = ["", "seconds an update", "processor seconds an update", "peak memory, MiB", "of it before training", *TASKS]
    compared = []
    for other in (TRL, TORCH):
        compared.append([f"{OURS} / {other}", *(spread(ratios(rows, other, key), 2) for key in CLOCKS)])
    clock, processor = (ratios(rows, TRL, key) for key in CLOCKS)
    return [
        "## The same work",
        f"General prompts alone, {options.rollouts} rollouts an update, turns of {options.turn} updates, the first of a seed "
        f"left out; scores after {options.updates} updates. TRL and camopd descend the reverse KL over the whole vocabulary; "
        "the bare loop has the cheaper sampled-token signal.",
        table(header, [line(name) for name in (TRL, TORCH, OURS)]),
        f"Ratio of neighbouring turns, {len(clock)} pairs:",
        table(["", "by the clock", "by the processor"], compared),
        f"Aim: at most 0.75 of TRL's time. Seen: {statistics.median(clock):.2f} by the clock, "
        f"{statistics.median(processor):.2f} by the processor (which says more where others use the machine too).",
    ]


def quality_text(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> list[str]:
    def line(row: Mapping[str, Any]) -> list[str]:
        taken = [*(f"{row[key]:.1f}" for key in CLOCKS), str(row["updates"])]
        scores = [f"{row['scores'][branch]:.3f}" for branch in TASKS]
        return [str(row["seed"]), row["name"], "yes" if row["reached"] else "no", *taken, *scores]

    ends = {(row["seed"], row["name"]): row for row in rows}
    both = [seed for seed in options.seeds if ends[seed, TORCH]["reached"] and ends[seed, OURS]["reached"]]
    shares = [[ends[seed, OURS][key] / ends[seed, TORCH][key] for seed in both] for key in CLOCKS]
    compared = "; ".join(
        f"{spread(part, 2)} by the {clock}" for part, clock in zip(shares, ("clock", "processor"), strict=True) if part
    )
    return [
        "## Time to quality",
        f"Training until general is at least {GENERAL} with the domain at {DOMAIN} or more, looked at every {options.look} "
        f"updates, for {options.limit} at most; {options.rollouts} rollouts an update. The bare loop alternates G, G, G, D "
        f"with the sampled-token loss; camopd runs `{RECIPE.name}` with its own method and signal.",
        table(
            ["seed", "", "reached", "seconds", "processor seconds", "updates", *TASKS],
            [line(ends[seed, name]) for seed in options.seeds for name in (TORCH, OURS)],
        ),
        f"Aim: at most half of the bare loop's time. Seen where both reached it: {compared or 'no seed'}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rollouts", type=int, default=64, help="prompts an update, one response each")
    parser.add_argument("--updates", type=int, default=160, help="updates of the same work")
    parser.add_argument("--turn", type=int, default=10, help="updates before the next contestant's turn")
    parser.add_argument("--look", type=int, default=4, help="updates between two looks at the quality")
    parser.add_argument("--limit", type=int, default=200, help="updates after which the quality is given up")
    parser.add_argument("--venv", type=Path, default=ROOT / ".cache" / "trl-venv", help="TRL's environment")
    options = parser.parse_args()
    python = {TRL: trl_python(options.venv)}
    with examiner() as examine:
        work = same_work(examine, python, options)
        quality = time_to_quality(examine, python, options)
    text = [
        "# Against TRL and a bare torch loop",
        f"`python benchmarks/against_trl.py`, {machine(note='one thread each')}, {TRL_PACKAGES[0].replace('==', ' ')} "
        f"(`DistillationTrainer`). Micro example, learning rate {load_recipe(RECIPE).train.learning_rate:g}, "
        f"temperature 1, seeds {', '.join(map(str, options.seeds))}. A spread is median (least to greatest).",
        *same_work_text(work, options),
        *quality_text(quality, options),
    ]
    RESULTS.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
