"""The whole recovery in one process: the exact Algorithm 1, with a fresh batch for every update.

With ``rollout.engine = "vllm"`` the student samples by vLLM, in processes of its own on the same device, which sleep while it
is scored and trained and wake up with its new weights. Teachers are asked in this process.

    from camopd.recover import recover

    recovered = recover("recipes/micro.toml", {"seed": 2})
    print(recovered.scores, recovered.report)
    model = AutoModelForCausalLM.from_pretrained(recovered.checkpoint)

Student and teachers stay in memory; sampling, scoring, selection and update are the functions of the pipeline's stages. A
checkpoint is written where the pipeline writes one, every ``steps_per_round`` updates, so resume, evaluation, promotion and
tracking are the same too. With one update a round the pipeline makes the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from camopd import plan as layout
from camopd import rollout, score, select
from camopd.adapters import Weights
from camopd.engines import Engine, check_installed
from camopd.engines.shared import engines_over
from camopd.engines.transformers import TransformersEngine, load_model
from camopd.past import known
from camopd.plan import Plan
from camopd.progress import Progress
from camopd.runtime import set_threads
from camopd.store import Store
from camopd.train import Trainer, selected_rows, training_config

if TYPE_CHECKING:
    from camopd.engines.colocated import ColocatedVllm


@dataclass(frozen=True)
class Recovered:
    """A finished recovery.

    Attributes:
        run_uri: the run's prefix.
        checkpoint: folder of the recovered model; transformers loads it.
        report: path of report.html.
        evaluation: what evaluation.json holds: scores, recovered and retained shares with intervals, the gate's decision.
        release: what promotion did: status, version (None where nothing was registered), alias and reasons.
    """

    run_uri: str
    checkpoint: Path
    report: Path
    evaluation: Mapping[str, Any]
    release: Mapping[str, Any]

    @property
    def scores(self) -> Mapping[str, float]:
        """Headline numbers: shares and scores by branch, with the ends of their 95 % intervals."""
        return self.evaluation["headline"]


def recover(recipe: str, parameters: Mapping[str, Any] | None = None, *, store: Store | None = None) -> Recovered:
    """Recover a model on this machine: check, train, evaluate and, if the gate says so, promote.

    Called again after a stop or a kill it goes on from the last checkpoint; called again when it is done it returns at once.

    Args:
        recipe: name, path, URI or text of the recipe.
        parameters: values that go before the recipe's, by dotted key: ``{"method": "mopd", "train.learning_rate": 1e-5}``.
        store: where to read and write.

    Raises:
        InputError: bad input, every problem at once, before a model is loaded.
        UnhealthyRunError: the run stopped itself.
    """
    from camopd import workflow
    from camopd.outcome import result_of

    store = store or Store()
    done = workflow.run(recipe, {**(parameters or {}), "execution": "colocated"}, store=store)
    plan = Plan.load(store, done.uri)
    result = result_of(plan, store)
    assert result, "every stage is done, so there is a result"
    assert result.release is not None, "promote leaves word of a refusal, too"
    return Recovered(
        run_uri=done.uri,
        checkpoint=store.fetch(layout.checkpoint_uri(plan.rounds[-1])),
        report=store.fetch(result.report),
        evaluation=result.evaluation,
        release=result.release,
    )


class Session:
    """Student and teachers of a run in memory.

    Args:
        plan: a prepared run.
        number: the round that the session begins with.
        store: where the models lie.

    Raises:
        EngineError: vLLM does not start.
        InputError: a model that the engine does not take, or vLLM is not installed.
    """

    def __init__(self, plan: Plan, number: int, store: Store) -> None:
        set_threads(plan.recipe.num_threads)
        rollout.teacher_prompts(plan, store)
        self.plan, self._store = plan, store
        # vLLM first: it takes its share of the device when nobody else is there yet, and gives it back when it sleeps.
        self._vllm = self._sleeping(number) if plan.recipe.rollout.engine == "vllm" else None
        self.trainer = Trainer.load(plan, number, store)
        self.trainer.fresh = True
        self.tables = rollout.PromptTables(plan, store)
        models, self._teachers = self._load_teachers()
        if plan.recipe.score.signal == "full":
            weights = {name: model.get_output_embeddings().weight for name, model in models.items()}
            self.trainer.teacher_weights = weights
        student = self._vllm or TransformersEngine(self.trainer.model, **plan.engine_limits)
        of_student = dict.fromkeys(models, student)
        self._samplers: Mapping[str, Engine] = self._teachers if plan.recipe.rollout.sampler == "teacher" else of_student

    def _load_teachers(self) -> tuple[dict[str, PreTrainedModel], dict[str, Engine]]:
        """Model and engine of each branch that takes part. What is or lies over one base has one set of weights in memory: with
        ``train.lora`` the student's own."""
        plan, store = self.plan, self._store
        weights = {b.name: plan.weights(plan.teacher_uri(b), store) for b in plan.recipe.branches if b.steps}
        held: dict[str, PreTrainedModel] = {}
        if plan.recipe.train.lora is not None:
            held[plan.weights(plan.recipe.student, store).base] = self.trainer.model
        for own in weights.values():
            if own.base not in held:
                held[own.base] = load_model(store.fetch(own.base)).requires_grad_(False)
        engines: dict[Weights, Engine] = {}
        for base, model in held.items():
            theirs = {own: store.fetch(own.adapter) if own.adapter else None for own in weights.values() if own.base == base}
            engines |= engines_over(model, theirs, **plan.engine_limits)
        return {name: held[own.base] for name, own in weights.items()}, {name: engines[own] for name, own in weights.items()}

    def _sleeping(self, number: int) -> ColocatedVllm:
        """vLLM, asleep, with a model like the student: its weights come when it wakes, so under an adapter the base will do."""
        check_installed("vllm")
        from camopd.engines.colocated import ColocatedVllm

        plan = self.plan
        like = self._store.fetch(plan.weights(plan.student_uri(number), self._store).base)
        return ColocatedVllm(like, **plan.engine_limits, max_length=plan.max_length, settings=plan.recipe.vllm)

    def close(self) -> None:
        """End what runs in other processes."""
        if self._vllm:
            self._vllm.close()

    def step(self) -> tuple[list[rollout.Row], dict[str, Any]]:
        """One iteration of Algorithm 1: sample, score, select, update. Returns what was sampled and the update's record."""
        batch, rows = self.collect()
        return batch, self.trainer.step(batch, rows)

    def collect(self) -> tuple[list[rollout.Row], list[dict[str, Any]]]:
        """Sample, score and select for the next update. Returns what was sampled, and what of it is scored, with ``kept``."""
        active = self.trainer.schedule.active
        batch = rollout.requests(self.plan, self.trainer.schedule, 1, self.tables.num_teacher_prompts)
        self.tables.fill(batch)
        self.trainer.optimizer.zero_grad(set_to_none=True)  # room for who samples
        with self._vllm.awake(self.trainer.model) if self._vllm else nullcontext():
            rollout.sample_rows(self._samplers, batch, self.plan)
        own = {name: [row for row in batch if row["branch"] == name] for name in active}
        scored = [row for name in active for row in score.score_rows(self._teachers[name], own[name], self.plan)]
        chosen = selected_rows(batch, scored, select.select_rows(batch, scored, self.plan))
        return batch, chosen.get(self.trainer.schedule.step, [])

    def round(self, number: int) -> None:
        """The updates of one round, and its checkpoint.

        Raises:
            UnhealthyRunError: the run stopped itself.
        """
        plan, store = self.plan, self._store
        planned = store.require(layout.plan_uri(plan.run_uri)).content_id
        inputs = {"student": plan.student_id(number, store), "plan": planned, **plan.base_id}

        def write(folder: Path) -> dict[str, Any]:
            begun = time.monotonic()
            steps, rounds = plan.recipe.steps_per_round, plan.recipe.num_rounds
            progress = Progress(
                "recover", total=steps, unit="steps", round_number=number, num_rounds=rounds, later=steps * (rounds - number)
            )
            sampled: list[rollout.Row] = []
            for _ in range(steps):
                batch, record = self.step()
                sampled += batch
                gaps = ", ".join(f"{name} {own['gap']:.3f}" for name, own in record["branches"].items())
                progress.advance(1, tokens=record["tokens"], note=f"gap {gaps}")
            begun_with = layout.checkpoint_uri(plan.rounds[0])
            first = (known(begun_with, store) or store.require(begun_with)).metrics if number > 1 else {}
            numbers = rollout.health(sampled, plan, first) | self.trainer.save(folder, store)
            return numbers | {"tokens_per_second": numbers["tokens"] / (time.monotonic() - begun)}

        uri = layout.checkpoint_uri(plan.rounds[number - 1])
        config = training_config(plan.recipe) | {"execution": "colocated"}
        store.produce(uri, stage="train", config=config, inputs=inputs, write=write)
