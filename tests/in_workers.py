"""What tests let worker processes do: updates of a tiny model as a stage does them, and every way to fail."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from camopd import plan as layout
from camopd.config import Branch, Recipe
from camopd.errors import InputError, Problem, UnhealthyRunError
from camopd.plan import Plan
from camopd.store import Store
from camopd.train import Trainer
from tests.reference import SHARED, K, make_rows

# Samples of each step by branch: odd numbers, mixed batches, and one sample for two processes.
STEPS = ({"general": 5}, {"general": 3, "domain": 4}, {"general": 1}, {"domain": 7})


def make_plan(run_uri: str, student: str, signal: str, train: dict[str, Any]) -> Plan:
    recipe = Recipe(
        student=student,
        branches=(
            Branch(name="general", role="recover", teacher="/models/general", prompts="/g.jsonl", steps=3, scale=2.0),
            Branch(name="domain", role="retain", prompts="/d.jsonl"),
        ),
        score={"signal": signal, "top_k": K},
        train={"batch_tokens": 24, "learning_rate": 1e-2, "max_engine_gap": 10, "diagnose_every": 0, **train},
        steps_per_round=len(STEPS),
    )
    return Plan(run_uri, recipe, {}, SHARED, (2,), 0, {"general": 50, "domain": 50}, "t", 32)


def make_step(step: int, counts: dict[str, int]) -> list[dict[str, Any]]:
    rollouts, scored = make_rows(counts, step=step, seed=step)
    return [{**row, **teacher, "kept": True} for row, teacher in zip(rollouts, scored, strict=True)]


def rounds(
    run_uri: str, student: str, signal: str, train: dict[str, Any], numbers: list[int], broken: int = -1
) -> list[dict[str, Any]]:
    """Rounds of updates with a checkpoint after each, every round from the checkpoint before. Returns their records.

    At step ``broken`` a teacher's log-probability is NaN.
    """
    torch.set_num_threads(1)
    plan, records = make_plan(run_uri, student, signal, train), []
    for number in numbers:
        trainer = Trainer.load(plan, number, Store())
        for counts in STEPS:
            rows = make_step(trainer.schedule.step, counts)
            if trainer.schedule.step == broken:
                rows[0]["logprobs"][:] = rows[0]["teacher_logprobs"]
                rows[0]["teacher_logprobs"][0] = float("nan")
            records.append(trainer.step(rows, rows))
        folder = Path(layout.checkpoint_uri(layout.round_uri(run_uri, number)))
        if trainer.student.rank == 0:
            folder.mkdir(parents=True)
        trainer.save(folder, Store())
        if dist.is_initialized():
            dist.barrier()  # a stage does one round, so nobody reads what the first process has yet to write
    return records


def masters(student: str, train: dict[str, Any]) -> dict[str, list[str]]:
    """Types of what an update of a spread student leaves: weights, gradients, moments; and those its layers computed in."""
    trainer = Trainer.load(make_plan("/runs/x", student, "topk", train), 1, Store())
    computed: set[str] = set()
    trainer.model.base_model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, out: computed.add(str(out.dtype)))
    rows = make_step(0, STEPS[0])
    trainer.step(rows, rows)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    kinds = {"weights": trainer.model.parameters(), "gradients": [p.grad for p in trainer.model.parameters()], "moments": moments}
    return {name: sorted({str(t.dtype) for t in tensors}) for name, tensors in kinds.items()} | {"computed": sorted(computed)}


def ranks_sum(value: int) -> int:
    """The sum of value + rank over the processes."""
    number = torch.tensor(value + dist.get_rank())
    dist.all_reduce(number)
    return int(number)


def fail(how: str, rank: int, pids: str = "") -> None:
    """One rank fails in its own way while the others wait for it."""
    if pids:
        Path(pids, str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == rank:
        if how == "unhealthy":
            raise UnhealthyRunError("the loss is a pear")
        if how == "input":
            raise InputError([Problem("train.x", "is wrong", "mend it"), Problem("train.y", "is wrong, too")])
        if how == "fault":
            raise KeyError("a secret prompt")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(7)
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))
