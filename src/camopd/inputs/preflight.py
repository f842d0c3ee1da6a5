"""What can be found out of the models before one runs: are they whole, of one kind and with one tokenizer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from camopd.adapters import weights_at
from camopd.config import Recipe
from camopd.errors import InputError, Problem, StoreError
from camopd.inputs.adapter_checks import check_adapter, check_lora
from camopd.inputs.checks import (
    ModelFacts,
    check_same_architecture,
    check_shapes,
    check_weights,
    copy_description,
    read_facts,
)
from camopd.inputs.teacher_prompts import user_turn
from camopd.inputs.tokens import Encoder, check_same_tokenizer, load_tokenizer, num_ids
from camopd.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Findings:
    """What the checks gather on their way."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Models:
    """The models of a recipe that could be read; ``tokenizers`` are by URI."""

    student: ModelFacts | None
    all: tuple[ModelFacts, ...]
    tokenizers: Mapping[str, PreTrainedTokenizerFast]

    @property
    def vocab_size(self) -> int:
        """Ids that the student's tokenizer and every head share."""
        assert self.student is not None
        return min(num_ids(self.tokenizers[self.student.uri]), *(facts.vocab_size for facts in self.all))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Whatever of config.json, generation_config.json and the tokenizer ends a response."""
        assert self.student is not None
        own = self.tokenizers[self.student.uri].eos_token_id
        ids = self.student.eos_ids | ({own} if own is not None else set())
        return tuple(sorted(number for number in ids if number < self.vocab_size))

    @property
    def pad_id(self) -> int:
        """The tokenizer's, or an end token where it has none: masks come from lengths, so any id will do."""
        assert self.student is not None
        own = self.tokenizers[self.student.uri].pad_token_id
        return self.eos_ids[0] if own is None else own


def check_models(named: Mapping[str, str], store: Store, scratch: Path, found: Findings, recipe: Recipe) -> Models:
    """Files, headers, configuration and tokenizer of each model, and whether the teachers are of the student's kind.

    Args:
        named: URI by the parameter that names the model, the student first; a URI stands there once.
        store: where they lie.
        scratch: takes their small files.
        found: takes what is wrong.
        recipe: tells the base of adapters, and what is to be done with the models.
    """
    read: list[ModelFacts] = []
    tokenizers: dict[str, PreTrainedTokenizerFast] = {}
    vllm = recipe.rollout.engine == "vllm"
    for number, (where, uri) in enumerate(named.items()):
        folder = scratch / str(number)
        try:
            weights = weights_at(uri, store, recipe.base)
            copy_description(store, weights, folder)
            facts, problems = read_facts(where, uri, folder)
            shapes, damage = check_weights(store, weights.base, tied=facts is None or facts.tied)
            if weights.adapter is not None:
                damage += check_adapter(where, weights, store, shapes, vllm=vllm)
            if where == "student" and recipe.train.lora is not None:
                damage += check_lora(recipe.train.lora, weights, store, shapes, vllm=vllm)
        except StoreError as error:
            found.problems.append(Problem(where, str(error)))
            continue
        found.problems += [problem for problem in problems + damage if problem not in found.problems]
        if facts is None:
            continue
        read.append(facts)
        tokenizer, problems = load_tokenizer(facts)
        found.problems += check_shapes(facts, shapes) + problems
        if tokenizer is not None:
            tokenizers[uri] = tokenizer
    student = next((facts for facts in read if facts.where == "student"), None)
    for teacher in read:
        if student is not None and teacher is not student:
            found.problems += check_same_architecture(student, teacher)
    models = Models(student, tuple(read), tokenizers)
    if student is not None and student.uri in tokenizers and not models.eos_ids:
        fix = "set eos_token_id in generation_config.json"
        found.problems.append(Problem("student", f"{student.uri} has no end token, so no response would end", fix))
    return models


def check_fit(recipe: Recipe, models: Models, found: Findings, served: Mapping[str, int | None] | None = None) -> int:
    """Longest prompt in tokens that leaves room for the response in every model; ``served`` are others' longest sequences."""
    lengths = {facts.uri: facts.max_length for facts in models.all} | dict(served or {})
    known = {uri: length for uri, length in lengths.items() if length}
    asked, response = recipe.prompts.max_prompt_tokens, recipe.rollout.max_new_tokens
    if not known:
        return asked
    shortest = min(known, key=lambda uri: known[uri])
    room = known[shortest] - response
    what = f"{response} response tokens leave {max(room, 0)} for a prompt in the {known[shortest]} positions of {shortest}"
    if room < 1:
        found.problems.append(Problem("rollout.max_new_tokens", what, f"set it below {known[shortest]}"))
    elif room < asked:
        found.warnings.append(f"{what}, fewer than prompts.max_prompt_tokens {asked}: longer prompts count as overlong")
    return min(room, asked)


def compare_tokenizers(models: Models, texts: Sequence[str], found: Findings) -> None:
    """Each teacher's tokenizer against the student's, on vocabulary, probe text and the first prompts."""
    if models.student is None or models.student.uri not in models.tokenizers:
        return
    student = models.tokenizers[models.student.uri]
    for teacher in models.all:
        if teacher is not models.student and teacher.uri in models.tokenizers:
            own = models.tokenizers[teacher.uri]
            problems, warnings = check_same_tokenizer(teacher.where, teacher.uri, student, own, texts)
            found.problems += problems
            found.warnings += warnings


def make_encoder(recipe: Recipe, models: Models, store: Store, found: Findings) -> Encoder | None:
    """The student's tokenizer with the chat template that the recipe asks for; None when either cannot be used."""
    if models.student is None or models.student.uri not in models.tokenizers:
        return None
    uri = recipe.prompts.chat_template
    try:
        template = store.read(uri).decode() if uri else None
    except StoreError:
        return None  # resolving the content ids has said so
    except UnicodeDecodeError:
        found.problems.append(Problem("prompts.chat_template", f"{uri} is not UTF-8", "save it as UTF-8"))
        return None
    try:
        tokenizer = models.tokenizers[models.student.uri]
        return Encoder(tokenizer, chat_template=template, enable_thinking=recipe.prompts.enable_thinking)
    except ValueError as error:
        where = "prompts.chat_template" if uri else "student"
        found.problems.append(Problem(where, str(error), "correct the template, or set prompts.chat_template to another"))
        return None


def check_teacher_prompts(recipe: Recipe, models: Models, encoder: Encoder | None) -> list[Problem]:
    """Whether the teachers that are to make up prompts can be asked for them, and the student can be asked these."""
    problems = []
    for branch in recipe.branches:
        tokenizer = models.tokenizers.get(recipe.teacher(branch))
        if not branch.teacher_prompts or not branch.steps or tokenizer is None or encoder is None:
            continue
        where = f"branches.{branch.name}"
        if encoder.template is None:
            what = f"tokenizer of {recipe.student} has no chat_template, which prompts of a teacher's own need"
            problems.append(Problem(f"{where}.teacher_prompts", what, "set prompts.chat_template"))
        try:
            user_turn(tokenizer, f"{where}.teacher", enable_thinking=recipe.prompts.enable_thinking)
        except InputError as error:
            problems += error.problems
    return problems
