"""The run's folder: where each thing lies, and the plan that every stage reads.

<output>/<name>-<id>/            the run: the id is made of what shapes the weights, so the same wish finds the same run
    recipe.json                  the recipe as last asked for (rounds, evaluation, gate and promotion may change)
    plan/                        plan.json, prompts-<branch>.parquet: written once by prepare
    teacher-prompts-<branch>/    prompts that a branch's teacher made up, where the recipe asks for them
    rounds/0001/                 one round; its prefix is what the pipeline's loop passes around
        rollout/ score-<branch>/ select/ train/      train/ is the checkpoint: a model folder with trainer state
        train-partial/ train-failure.json            while it is trained: what is kept of its updates, why they failed
    evaluation/<id>/             scores, samples, report.html, decision
    release/<id>/                what promote did; model/ below it is what a registry version points to
    stop.json                    why the run stopped itself, if it did
    attempts/ cut-off/           which stages have begun and ended, and which attempts ended without a word
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from camopd.adapters import Weights, tokenizer_folder, weights_at
from camopd.config import Branch, Recipe
from camopd.errors import InputError, Problem
from camopd.recipe.served import is_served
from camopd.store import Store, digest, join, parent

if TYPE_CHECKING:
    from camopd.schedule import Schedule


def plan_uri(run_uri: str) -> str:
    return join(run_uri, "plan")


TEMPLATE = "chat_template.jinja"  # in the plan: the template that rendered the prompts
TRAINER, STEPS = "trainer", "steps.json"  # in a checkpoint: what is not the model


def prompts_file(branch: str) -> str:
    return f"prompts-{branch}.parquet"


def round_uri(run_uri: str, number: int) -> str:
    """Prefix of round ``number``, counted from 1."""
    return join(run_uri, "rounds", f"{number:04d}")


def run_and_round(uri: str) -> tuple[str, int]:
    """The run's prefix and the round's number of a round's prefix. Raises InputError on any other prefix."""
    name, above = uri.rstrip("/").rpartition("/")[2], parent(uri)
    if not name.isdigit() or not above.endswith("/rounds"):
        raise InputError([Problem("round", f"{uri!r} is not a round", "the form is <run>/rounds/0001")])
    return parent(above), int(name)


def rollout_uri(round_uri: str) -> str:
    return join(round_uri, "rollout")


def score_uri(round_uri: str, branch: str) -> str:
    return join(round_uri, f"score-{branch}")


def select_uri(round_uri: str) -> str:
    return join(round_uri, "select")


def checkpoint_uri(round_uri: str) -> str:
    return join(round_uri, "train")


def is_companion(name: str) -> bool:
    """Whether a file of a model folder belongs to the tokenizer or generation: neither weights nor what we write ourselves."""
    ours = {"config.json", "adapter_config.json", "manifest.json", STEPS}
    return name not in ours and not name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".pt", ".md"))


def teacher_prompts_uri(run_uri: str, branch: str) -> str:
    return join(run_uri, f"teacher-prompts-{branch}")


def stop_uri(run_uri: str) -> str:
    return join(run_uri, "stop.json")


def training_config(recipe: Recipe, content_ids: dict[str, str]) -> dict[str, Any]:
    """What shapes the weights, with locations replaced by content ids. Its digest names the run."""
    shaping = {
        "method",
        "mixing",
        "execution",
        "seed",
        "steps_per_round",
        "num_threads",
        "prompts",
        "rollout",
        "score",
        "train",
    }
    config = recipe.model_dump(mode="json", include=shaping)
    config["rollout"] = recipe.rollout.model_dump(mode="json", exclude=set(recipe.rollout.HOW))
    config["train"] = recipe.train.shaping()
    if recipe.rollout.engine == "vllm":
        config["vllm"] = {"dtype": recipe.vllm.dtype}
    config["student"] = content_ids["student"]
    config["prompts"]["chat_template"] = content_ids.get("chat_template")
    config["branches"] = [
        branch.model_dump(mode="json", exclude={"tasks", "role"})
        | {"teacher": content_ids[f"teacher/{branch.name}"], "prompts": content_ids.get(f"prompts/{branch.name}")}
        for branch in recipe.branches
    ]
    return config


@dataclass(frozen=True)
class Plan:
    """What prepare found out, and the recipe it belongs to.

    Attributes:
        run_uri: the run's prefix.
        recipe: the recipe as last asked for.
        content_ids: identity of ``student``, ``teacher/<branch>`` and, where there is one, ``prompts/<branch>``,
            ``chat_template``; of an adapter's base, ``student/base`` and ``teacher/<branch>/base``.
        vocab_size: token ids 0 .. vocab_size - 1 are shared by the tokenizer and all models; the rest is masked everywhere.
        eos_ids: token ids that end a response.
        pad_id: token id that fills a batch.
        num_prompts: accepted prompts of each branch's file.
        template_id: digest of the chat template and its switches; a stage that finds another refuses to start.
        max_prompt_tokens: longest prompt that leaves room for the response in every model.
        warnings: sentences for the report.
        served: what each served teacher said of a fixed text, by content id (camopd.inputs.served).
    """

    run_uri: str
    recipe: Recipe
    content_ids: dict[str, str]
    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    num_prompts: dict[str, int]
    template_id: str
    max_prompt_tokens: int
    warnings: tuple[str, ...] = field(default_factory=tuple)
    served: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The part that never changes in a run: everything but the recipe and the place."""
        without = {"run_uri", "recipe"} | ({"served"} if not self.served else set())
        record = {k: v for k, v in asdict(self).items() if k not in without}
        return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, store: Store, run_uri: str) -> Plan:
        """Read the plan of a prepared run. Raises StoreError when it was not prepared."""
        store.require(plan_uri(run_uri))
        record = json.loads(store.read(join(plan_uri(run_uri), "plan.json")))
        recipe = Recipe.model_validate_json(store.read(join(run_uri, "recipe.json")))
        tuples = {name: tuple(record[name]) for name in ("eos_ids", "warnings")}
        return cls(run_uri=run_uri, recipe=recipe, **{**record, **tuples})

    @property
    def rounds(self) -> list[str]:
        """The prefix of each round, in order."""
        return [round_uri(self.run_uri, number) for number in range(1, self.recipe.num_rounds + 1)]

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.recipe.num_rounds * self.recipe.steps_per_round

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, prompt and response together."""
        return self.max_prompt_tokens + self.recipe.rollout.max_new_tokens

    @property
    def engine_limits(self) -> dict[str, int]:
        """The limits that every engine with a model of this run has."""
        sizes = {"batch_size": self.recipe.rollout.batch_size, "batch_tokens": self.recipe.score.batch_tokens}
        return sizes | {"vocab_size": self.vocab_size}

    def schedule(self, number: int) -> Schedule:
        """Where the schedule stands when round ``number`` begins."""
        from camopd.schedule import Schedule

        return Schedule.of(self.recipe, (number - 1) * self.recipe.steps_per_round)

    def active_branches(self, number: int) -> list[Branch]:
        """The branches that have prompts in round ``number``."""
        steps = self.schedule(number).ahead(self.recipe.steps_per_round)
        names = {name for at in steps for name in at.active}
        return [branch for branch in self.recipe.branches if branch.name in names]

    def student_uri(self, number: int) -> str:
        """The checkpoint that round ``number`` starts from: the domain model, or the round before."""
        return self.recipe.student if number == 1 else checkpoint_uri(round_uri(self.run_uri, number - 1))

    def student_id(self, number: int, store: Store) -> str:
        """Content id of that checkpoint."""
        return self.content_ids["student"] if number == 1 else store.require(self.student_uri(number)).content_id

    @property
    def base_id(self) -> dict[str, str]:
        """Content id of the model under the adapter that learns, an input like others; nothing where all weights learn."""
        own = self.content_ids.get("student/base") or self.content_ids.get("student", "")
        return {"base": own} if self.recipe.train.lora else {}

    def teacher_uri(self, branch: Branch) -> str:
        return self.recipe.teacher(branch)

    def weights(self, uri: str, store: Store) -> Weights:
        """What lies at the location of a model of this run: a checkpoint that is an adapter belongs to the domain model's base.

        Raises InputError for another adapter whose base nobody names; `prepare` has asked.
        """
        base = self.recipe.base
        if is_served(uri):
            return Weights(uri)
        if uri.startswith(f"{self.run_uri}/"):
            base = weights_at(self.recipe.student, store, base).base
        return weights_at(uri, store, base)

    def places(self, uris: Iterable[str], store: Store) -> list[str]:
        """The folders that models are made of, each once."""
        return list(dict.fromkeys(place for uri in uris for place in self.weights(uri, store).locations))

    def tokenizer_uri(self, uri: str, store: Store) -> str:
        """Where the tokenizer of the model at a location lies."""
        return tokenizer_folder(self.weights(uri, store), store)


def run_id(recipe: Recipe, content_ids: dict[str, str]) -> str:
    """``<name>-<12 hex digits>``: the same content and settings give the same id wherever they lie."""
    return f"{recipe.name}-{digest(training_config(recipe, content_ids)).removeprefix('sha256:')[:12]}"
