"""Stage 5: the round's updates, in the schedule's order, on the selected samples (method sections 2 and 3)."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from camopd import plan as layout
from camopd.checkpoint import load_state, snapshot
from camopd.config import Recipe
from camopd.diagnostics import measure
from camopd.engines.transformers import device, output_head
from camopd.errors import UnhealthyRunError
from camopd.group import Group, current
from camopd.lora import Output, load_student
from camopd.partial import Partial, forget_partial
from camopd.plan import STEPS, Plan
from camopd.progress import Progress
from camopd.records import read_table
from camopd.runtime import set_threads
from camopd.schedule import Schedule, seed_of
from camopd.store import Manifest, Store, join, parent
from camopd.student import Student
from camopd.update import batch_numbers, make_optimizer, rows_loss, update
from camopd.workers import check_devices, run_workers

NOTHING_TRAINED = {"gap": 0.0, "kept_ratio": 1.0, "topk_mass": 1.0}  # of a branch none of whose samples were selected
Row = Mapping[str, Any]


def selected_rows(rollouts: Iterable[Row], scored: Iterable[Row], selection: Iterable[Row]) -> dict[int, list[dict[str, Any]]]:
    """The scored samples of each optimiser step with everything the loss needs and ``kept``, joined by key."""

    def key(row: Row) -> tuple[str, str, int]:
        return row["branch"], row["prompt_id"], row["sample_index"]

    kept = {key(row): row["kept"] for row in selection}
    teachers = {key(row): row for row in scored}
    rows = [{**row, **teachers[key(row)], "kept": kept[key(row)]} for row in rollouts if key(row) in kept]
    by_step = itemgetter("step")
    return {step: list(group) for step, group in groupby(sorted(rows, key=by_step), key=by_step)}


def check_fresh(engine_gap: float, limit: float, remedy: str = "remove the round's rollout") -> None:
    """Before an update on fresh rollouts trainer and engine hold the same weights: a large gap means one of them does not.

    Raises:
        UnhealthyRunError: mean |log p_engine - log p_trainer| above ``limit`` nats (healthy 0.01 to 0.02, stale weights 0.2).
    """
    if engine_gap > limit:
        raise UnhealthyRunError(
            f"mean |log p_engine - log p_trainer| is {engine_gap:.3f} nats on fresh rollouts, above "
            f"train.max_engine_gap = {limit}: they were not sampled from the weights in training; {remedy}"
        )


@dataclass
class Trainer:
    """The student and its optimiser between updates.

    Attributes:
        plan: the run's plan.
        student: the model and how it computes.
        optimizer: of its parameters.
        source: the folder that it was loaded from, with the tokenizer's files.
        schedule: where the next update stands.
        records: what each update since the last save had to tell.
        teacher_weights: of the teachers' output layers by branch, for the full signal.
        latest: the last batch of each branch since the last save, for the diagnostics.
        fresh: whether every batch is sampled from the weights that it updates; else the first after a save is.
    """

    plan: Plan
    student: Student
    optimizer: torch.optim.Optimizer
    source: Path
    schedule: Schedule
    records: list[dict[str, Any]] = field(default_factory=list)
    teacher_weights: Mapping[str, Tensor] = field(default_factory=dict)
    latest: dict[str, Sequence[Row]] = field(default_factory=dict)
    fresh: bool = False

    @classmethod
    def load(cls, plan: Plan, number: int, store: Store, within: str | None = None) -> Trainer:
        """Go on where round ``number`` begins: from the domain model, or from the checkpoint of the round before.

        Args:
            plan: the run's plan.
            number: the round.
            store: where the models lie.
            within: a checkpoint made in the middle of the round, to go on from there.
        """
        recipe = plan.recipe
        torch.manual_seed(seed_of(recipe.seed, "train", number))
        before = plan.student_uri(number) if number > 1 else None
        source = store.fetch(before or plan.tokenizer_uri(recipe.student, store))
        begun = within or before
        folder = store.fetch(begun) if begun else None
        group = current()
        where = device() if group.size == 1 else torch.device("meta" if group.rank else "cpu")
        model = load_student(plan, folder, store, where)
        if group.rank == 0:  # who alone has read weights; ``Student`` hands them to the others
            output_head(model)  # refuses a head that the loss does not know
        student = Student(model, recipe.train)
        optimizer = make_optimizer(model, recipe)
        done = load_state(folder, model, optimizer) if folder else 0
        records = json.loads((folder / STEPS).read_text()) if folder and within else []
        schedule = plan.schedule(number).advance(len(records))
        assert done == schedule.step, "the checkpoint is not the round before's last step"
        return cls(plan, student, optimizer, source, schedule, records)

    @property
    def model(self) -> PreTrainedModel:
        return self.student.model

    def step(self, batch: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
        """One update, and its record.

        Args:
            batch: everything that was sampled for the step.
            rows: what of it was scored, each row with ``kept``.

        Raises:
            UnhealthyRunError: nothing to train on, stale weights, or a loss that is not finite.
        """
        recipe = self.plan.recipe
        kept = [row for row in rows if row["kept"]]
        if not kept:
            raise UnhealthyRunError(
                f"step {self.schedule.step} has no response with anything to score; see the round's rollouts.parquet"
            )
        self.see(rows)
        diagnostics = self._diagnostics()
        numbers = update(
            self.student,
            self.optimizer,
            kept,
            recipe=recipe,
            vocab_size=self.plan.vocab_size,
            teacher_weights=self.teacher_weights,
        )
        if self.fresh:
            check_fresh(numbers["engine_gap"], recipe.train.max_engine_gap, "look at the log of the engine")
        elif not self.records:
            check_fresh(numbers["engine_gap"], recipe.train.max_engine_gap)
        counts = batch_numbers(batch, kept)
        branches = {name: own | numbers["branches"].get(name, NOTHING_TRAINED) for name, own in counts.items()}
        tokens = sum(own["tokens"] for own in counts.values())
        record = {"step": self.schedule.step, **numbers, "tokens": tokens, "branches": branches, **diagnostics}
        self.records.append(record)
        self.schedule = self.schedule.advance()
        return self.records[-1]

    def see(self, rows: Sequence[Row]) -> None:
        """Take a step's scored samples for the last ones of their branches."""
        names = dict.fromkeys(row["branch"] for row in rows)
        self.latest |= {name: [row for row in rows if row["branch"] == name] for name in names}

    def _diagnostics(self) -> dict[str, Any]:
        """How the branches' gradients stand to each other before this update, when it is time to look.

        Always in float32. Not where the model is spread: gradients of single samples are wanted whole, and no process has room.
        """
        recipe, every = self.plan.recipe, self.plan.recipe.train.diagnose_every
        if not every or (self.schedule.step + 1) % every or self.student.num_ranks > 1:
            return {}

        def loss_of(row: Row) -> Tensor:
            weight = self.teacher_weights.get(row["branch"])
            vocab_size = self.plan.vocab_size
            return rows_loss(self.model, [row], recipe=recipe, vocab_size=vocab_size, num_selected=1, teacher_weight=weight)[0]

        return {"diagnostics": measure(self.model, self.latest, loss_of)}

    def frozen(self, store: Store, *, copy: bool = False) -> Callable[[Path, Group], None]:
        """A function that writes the checkpoint as it is now, and ``steps.json`` of the updates since the last round.

        Neither times nor what an earlier round left in memory go into it: a run that was stopped makes the same bytes. Of
        several processes each writes its part; all must call.

        Args:
            store: where the plan lies.
            copy: whether updates go on before the function is called.
        """
        used = join(layout.plan_uri(self.plan.run_uri), layout.TEMPLATE)
        template = store.read(used) if store.stat(used) else None
        seed, lora = self.plan.recipe.seed, Output.of(self.plan, store)
        taken = snapshot(self.model, self.optimizer, self.schedule, seed=seed, copy=copy, lora=lora)
        steps = json.dumps(self.records, indent=1) + "\n"

        def write(folder: Path, group: Group) -> None:
            taken.write(folder, group, student=self.source, template=template, finished=store.send)
            if group.rank == 0:
                (folder / STEPS).write_text(steps)

        return write

    def save(self, folder: Path, store: Store) -> dict[str, float]:
        """Write the checkpoint. Returns the headline numbers of the updates since the last one."""
        self.frozen(store)(folder, current())
        numbers = headline(self.records)
        self.records, self.latest = [], {}
        return numbers


def run(round_uri: str, *, store: Store | None = None) -> Manifest:
    """Write the checkpoint of a round: a model folder, trainer state, and ``steps.json`` with the metrics of each update.

    The prefix appears as a whole or not at all, and no update is applied twice: a killed attempt starts the round's updates
    again from the round before, or from what ``train.checkpoint_every`` has kept of them.

    With ``train.num_processes`` above 1 the updates are done by as many processes that this one starts and waits for. Processes
    that have joined a group already, as torchrun's do, all call this and share the updates. What is read and written is the
    same, and rounds of one run may have different numbers.

    Args:
        round_uri: ``<run>/rounds/0001``, rolled out, scored and selected.
        store: where to read and write.

    Raises:
        InputError: more processes than GPUs.
        UnhealthyRunError: stale weights, or a loss that is not finite.
        WorkerError: one of several processes died or met a fault.
    """
    store, group = store or Store(), current()
    run_uri, number = layout.run_and_round(round_uri)
    plan = Plan.load(store, run_uri)
    inputs = {name: store.require(parent(uri)).content_id for name, uri in _tables(plan, number).items()}
    inputs |= {"student": plan.student_id(number, store), **plan.base_id}
    uri, config = layout.checkpoint_uri(round_uri), training_config(plan.recipe)
    num_processes = plan.recipe.train.num_processes
    if group.size == 1 and num_processes > 1:
        if store.finished(uri, stage="train", config=config, inputs=inputs) is None:
            check_devices(num_processes)
            gc.collect()
            torch.cuda.empty_cache()  # `camopd run` has sampled and scored in this process, and the first GPU is one of theirs
            run_workers("camopd.train:share", {"round_uri": round_uri}, num_processes=num_processes)
        forget_partial(round_uri, store)
        return store.require(uri)
    partial = Partial(round_uri, config=config, inputs=inputs, store=store, group=group)

    def write(folder: Path) -> dict[str, Any]:
        begun = time.monotonic()
        trainer = updates(plan, number, store, partial)
        numbers = trainer.save(folder, store) | partial.numbers()
        return numbers | {"tokens_per_second": numbers["tokens"] / (time.monotonic() - begun)}

    manifest = store.produce(uri, stage="train", config=config, inputs=inputs, write=write, writers=group)
    if group.rank == 0:
        forget_partial(round_uri, store)
    return manifest


def share(round_uri: str) -> None:
    """``run`` as one of several processes."""
    run(round_uri)


def _tables(plan: Plan, number: int) -> dict[str, str]:
    """The tables that a round's updates read."""
    uri = layout.round_uri(plan.run_uri, number)
    names = [branch.name for branch in plan.active_branches(number)]
    tables = {
        "rollout": join(layout.rollout_uri(uri), "rollouts.parquet"),
        "select": join(layout.select_uri(uri), "selection.parquet"),
    }
    return tables | {f"score/{name}": join(layout.score_uri(uri, name), "scored.parquet") for name in names}


def updates(plan: Plan, number: int, store: Store, partial: Partial) -> Trainer:
    """The updates of one round, alone or as one of several processes. Returns the trainer after the last."""
    recipe, tables, group = plan.recipe, _tables(plan, number), current()
    set_threads(recipe.num_threads, num_processes=group.on_this_machine)
    within = partial.last()
    if group.local_rank == 0:  # once on a machine, before several would at the same time
        domain = plan.weights(recipe.student, store).locations if number == 1 or recipe.train.lora else ()
        for uri in {*domain, plan.student_uri(number), *tables.values(), *([within] if within else [])}:
            store.fetch(uri)
    group.gather(None)
    trainer = Trainer.load(plan, number, store, within)
    rollouts = read_table(store.fetch(tables.pop("rollout")), "rollouts")
    selection = read_table(store.fetch(tables.pop("select")), "selection")
    scored = [row for uri in tables.values() for row in read_table(store.fetch(uri), "scored")]
    chosen = selected_rows(rollouts, scored, selection)
    total, rounds, done = recipe.steps_per_round, recipe.num_rounds, len(trainer.records)
    if group.rank == 0:
        progress = Progress(
            "train", total=total, unit="steps", round_number=number, num_rounds=rounds, done=done, waited=store.waited
        )
    for at in plan.schedule(number).ahead(total):
        rows = chosen.get(at.step, [])
        if at.step < trainer.schedule.step:
            trainer.see(rows)
            continue
        record = trainer.step([row for row in rollouts if row["step"] == at.step], rows)
        if group.rank == 0:
            progress.advance(1, tokens=record["tokens"], branch=", ".join(at.active))
        if partial.wanted(len(trainer.records), recipe):
            partial.save(len(trainer.records), lambda: trainer.frozen(store, copy=True))
    partial.wait()
    return trainer


def training_config(recipe: Recipe) -> dict[str, Any]:
    """The settings that shape a round's updates."""
    config = recipe.train.shaping()
    config |= {"signal": recipe.score.signal, "num_threads": recipe.num_threads}
    scale = {branch.name: branch.scale for branch in recipe.branches}
    return config | {"method": recipe.method, "cycle": Schedule.of(recipe).cycle, "scale": scale}


def headline(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the round's steps, by branch, and the engine gap before the first update."""
    numbers: dict[str, float] = {"engine_gap": steps[0]["engine_gap"], "num_steps": len(steps)}
    numbers["tokens"] = sum(step["tokens"] for step in steps)
    for key in ("loss", "grad_norm", "kept_ratio", "entropy"):
        numbers[key] = sum(step[key] for step in steps) / len(steps)
    for name in sorted({name for step in steps for name in step["branches"]}):
        own = [step["branches"][name] for step in steps if name in step["branches"]]
        for key in ("gap", "kept_ratio", "topk_mass", "mean_length", "num_selected"):
            numbers[f"{name}/{key}"] = sum(step[key] for step in own) / len(own)
    return numbers


if __name__ == "__main__":
    from camopd.torchrun import main

    main()
