"""What tests let worker processes do: updates of a tiny model, as a stage does them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from camopd import plan as layout
from camopd import train as training
from camopd.checkpoint import load_state
from camopd.config import Branch, Recipe
from camopd.engines.transformers import load_model
from camopd.group import current
from camopd.lora import load_student
from camopd.plan import Plan
from camopd.store import Store
from camopd.student import Student, whole
from camopd.train import Trainer
from camopd.update import make_optimizer
from tests.reference import SHARED, K, make_rows

# Samples of each step by branch: odd numbers, mixed batches, and one sample for two processes.
STEPS = ({"general": 5}, {"general": 3, "domain": 4}, {"general": 1}, {"domain": 7})

LIMITS = {"ratio_low": 0.2, "ratio_high": 5.0}  # so wide that the one sample's step still has something to learn


def make_plan(run_uri: str, student: str, signal: str, train: dict[str, Any]) -> Plan:
    recipe = Recipe(
        student=student,
        branches=(
            Branch(name="general", role="recover", teacher="/models/general", prompts="/g.jsonl", steps=3, scale=2.0),
            Branch(name="domain", role="retain", prompts="/d.jsonl"),
        ),
        score={"signal": signal, "top_k": K},
        train={"batch_tokens": 24, "learning_rate": 3e-3, "max_engine_gap": 10, "diagnose_every": 0, **LIMITS, **train},
        steps_per_round=len(STEPS),
    )
    return Plan(run_uri, recipe, {}, SHARED, (2,), 0, {"general": 50, "domain": 50}, "t", 32)


def make_step(step: int, counts: dict[str, int], *, tied: bool = True) -> list[dict[str, Any]]:
    rollouts, scored = make_rows(counts, step=step, seed=step, drift=0.3, tied=tied)
    return [{**row, **teacher, "kept": True} for row, teacher in zip(rollouts, scored, strict=True)]


def rounds(
    run_uri: str, student: str, signal: str, train: dict[str, Any], numbers: Sequence[int], broken: int = -1
) -> list[dict[str, Any]]:
    """Rounds of updates with a checkpoint after each, every round from the checkpoint before. Returns their records.

    At step ``broken`` a teacher's log-probability is NaN.
    """
    torch.set_num_threads(1)
    plan, records = make_plan(run_uri, student, signal, train), []
    for number in numbers:
        trainer = Trainer.load(plan, number, Store())
        if trainer.student.num_ranks > 1:
            held = sum(p.to_local().numel() for p in trainer.model.parameters())
            assert held < 1.2 / trainer.student.num_ranks * sum(p.numel() for p in trainer.model.parameters())
        for counts in STEPS:
            rows = make_step(trainer.schedule.step, counts, tied=trainer.model.config.tie_word_embeddings)
            if trainer.schedule.step == broken:
                rows[0]["logprobs"][:] = rows[0]["teacher_logprobs"]
                rows[0]["teacher_logprobs"][0] = float("nan")
            records.append(trainer.step(rows, rows))
        uri = layout.checkpoint_uri(layout.round_uri(run_uri, number))

        def save(folder: Path, trainer: Trainer = trainer) -> dict[str, float]:
            return trainer.save(folder, Store())

        Store().produce(uri, stage="train", config={}, inputs={}, write=save, writers=current())
    return records


def moments(folders: Sequence[str], student: str) -> list[str]:
    """Digest of the weights and moments that the first process has after loading a checkpoint, each whole; of each folder."""
    plan, found = make_plan("/runs/x", student, "topk", {}), []
    for folder in map(Path, folders):
        model = load_model(folder, torch.device("cpu"))
        trained = Student(model, plan.recipe.train)
        optimizer = make_optimizer(trained.model, plan.recipe)
        load_state(folder, trained.model, optimizer)
        tensors = [whole(p) for p in model.parameters()]
        tensors += [whole(value) for p in model.parameters() for _, value in sorted(optimizer.state[p].items())]
        found.append(hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest())
    return found


def loaded(cases: Sequence[tuple[str, dict[str, Any]]]) -> list[list[Any]]:
    """Of each student and settings: how many bytes of tensors each process has loaded, and a digest of what it holds once the
    model is spread, each tensor whole: parameters and buffers by name, what learns, how it attends."""
    read, found = [], []

    def counted(*arguments: Any) -> Any:
        model = load_student(*arguments)
        read.append(sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta))
        return model

    training.load_student = counted  # this process is the test's own
    for student, settings in cases:
        model = Trainer.load(make_plan("/runs/x", student, "topk", settings), 1, Store()).model
        seen = hashlib.sha256(model.config._attn_implementation.encode())
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            seen.update(f"{name} {tensor.requires_grad}".encode() + whole(tensor).detach().numpy().tobytes())
        found.append(current().gather([read[-1], seen.hexdigest()]))
    training.load_student = load_student
    return found


def kinds_of_numbers(student: str, train: dict[str, Any]) -> dict[str, list[str]]:
    """Types of what an update leaves, weights, gradients and moments, and of what the layers computed."""
    trainer, computed = Trainer.load(make_plan("/runs/x", student, "topk", train), 1, Store()), []
    trainer.model.base_model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, out: computed.append(out))
    rows = make_step(0, STEPS[0])
    trainer.step(rows, rows)
    parameters = list(trainer.model.parameters())
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    kinds = {"computed": computed, "weights": parameters, "gradients": [p.grad for p in parameters], "moments": moments}
    return {name: sorted({str(tensor.dtype) for tensor in tensors}) for name, tensors in kinds.items()}
