"""Everything that can be found out before a model runs: are the models whole and of one kind, and which prompts can be used?"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camopd.adapters import weights_at
from camopd.config import Branch, Recipe
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
from camopd.inputs.prompts import Prompt, Rejected, count_lines, read_prompts
from camopd.inputs.teacher_prompts import user_turn
from camopd.inputs.tokens import NO_TEMPLATE, Encoded, Encoder, check_same_tokenizer, load_tokenizer, num_ids
from camopd.plan import prompts_file
from camopd.progress import Progress
from camopd.records import open_table
from camopd.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_SHOWN = 20  # reasons that a message lists
NUM_PROBES = 64  # prompts of a branch whose ids are compared between tokenizers
_BATCH = 1024  # prompts encoded together; also a row group of the table, so that a step reads few rows it does not need


@dataclass
class Findings:
    """What the checks gather on their way."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


# --- Models ---------------------------------------------------------------------------------------------------------------


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


# --- Prompts --------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the rows of one prompt file.

    Attributes:
        read: rows that are not blank.
        accepted: rows written to the table.
        rejected: unusable rows by reason.
        overlong: rows skipped or cut for their length.
        notes: what was done to accepted rows, by kind.
        tokens: sum of the accepted rows' lengths, and the longest.
        shown: the first rejected rows, and the first overlong ones.
        probes: the first accepted texts.
    """

    read: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    overlong: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    longest: int = 0
    shown: list[Problem] = field(default_factory=list)
    shown_overlong: list[Problem] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)

    def reject(self, row: Rejected, location: str) -> None:
        self.rejected[row.reason] += 1
        if len(self.shown) < NUM_SHOWN and row.reason != NO_TEMPLATE:
            self.shown.append(row.problem(location))

    def headline(self) -> dict[str, float]:
        """Numbers for the run's metrics."""
        rejected = {f"rejected/{reason}": count for reason, count in sorted(self.rejected.items())}
        return {"read": self.read, "accepted": self.accepted, "overlong": self.overlong, **rejected}

    def to_record(self) -> dict[str, Any]:
        """For preflight.json: reasons and places, never a prompt's text."""
        return {
            "read": self.read,
            "accepted": self.accepted,
            "rejected": dict(sorted(self.rejected.items())),
            "overlong": self.overlong,
            "notes": dict(sorted(self.notes.items())),
            "mean_tokens": round(self.tokens / max(self.accepted, 1), 2),
            "longest_tokens": self.longest,
            "first_rejected": [str(problem) for problem in self.shown],
            "first_overlong": [str(problem) for problem in self.shown_overlong],
        }


def encode_file(
    path: Path,
    location: str,
    encoder: Encoder | None,
    *,
    limit: int,
    overlong: str,
    write: Write,
    progress: Callable[[int], None],
) -> Tally:
    """Read, render, encode and write one prompt file, batch by batch.

    Args:
        path: local file.
        location: what messages call it.
        encoder: None checks the rows alone.
        limit: longest prompt in tokens.
        overlong: ``truncate_left`` cuts a longer one; other words leave it out and count it.
        write: takes the rows of a batch.
        progress: told of the lines read.

    Raises:
        InputError: what is wrong with the file as a whole.
    """
    tally = Tally()
    line = 0
    batches = _batches(read_prompts(path, location), _BATCH)
    for batch in encoder.encode(batches) if encoder else batches:
        rows = []
        for item in batch:
            if isinstance(item, Rejected):
                tally.reject(item, location)
            elif isinstance(item, Encoded) and (row := _row(item, encoder, location, limit, overlong, tally)) is not None:
                rows.append(row)
        if rows:
            write(rows)
        tally.read += len(batch)
        progress(batch[-1].line - line)
        line = batch[-1].line
    return tally


Write = Callable[[Sequence[Mapping[str, Any]]], None]


def _batches(items: Iterator[Prompt | Rejected], size: int) -> Iterator[list[Prompt | Rejected]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _row(
    item: Encoded, encoder: Encoder | None, location: str, limit: int, overlong: str, tally: Tally
) -> dict[str, Any] | None:
    """The table's row of an encoded prompt; None when it is too long. Counts either."""
    assert encoder is not None
    prompt, text, ids = item.prompt, item.text, item.ids
    if len(ids) > limit:
        tally.overlong += 1
        if len(tally.shown_overlong) < NUM_SHOWN:
            what = f"id {prompt.id[:80]!r}: prompt has {len(ids)} tokens, {limit} are allowed"
            tally.shown_overlong.append(Problem(f"{location}:{prompt.line}", what))
        if overlong != "truncate_left":
            return None
        ids = encoder.truncated(ids, limit)
        text = encoder.decode(ids)
    tally.accepted += 1
    tally.tokens += len(ids)
    tally.longest = max(tally.longest, len(ids))
    if prompt.notes:
        tally.notes.update(prompt.notes)
    if len(tally.probes) < NUM_PROBES:
        tally.probes.append(text)
    return {"prompt_id": prompt.id, "line": prompt.line, "text": text, "token_ids": ids}


def encode_branches(
    recipe: Recipe, encoder: Encoder | None, paths: Mapping[str, Path], *, limit: int, folder: Path, found: Findings
) -> dict[str, Tally]:
    """The prompt table of each branch, and what became of its rows; a branch whose file is unusable is not among them.

    Args:
        recipe: the recipe.
        encoder: None checks the rows alone.
        paths: local prompt file by branch.
        limit: longest prompt in tokens.
        folder: takes the tables.
        found: takes what is wrong.
    """
    progress = Progress("prepare", total=sum(map(count_lines, paths.values())), unit="prompts")
    tallies = {}
    for branch in recipe.branches:
        if branch.name not in paths:
            continue
        try:
            with open_table(folder / prompts_file(branch.name), "prompts") as write:
                tally = encode_file(
                    paths[branch.name],
                    branch.prompts,
                    encoder,
                    limit=limit,
                    overlong=recipe.prompts.overlong,
                    write=write,
                    progress=partial(progress.advance, branch=branch.name),
                )
        except InputError as error:
            found.problems += error.problems
            continue
        tallies[branch.name] = tally
        found.problems += judge(tally, branch, recipe, usable=encoder is not None and limit > 0)
        found.warnings += remarks(tally, branch, recipe)
    return tallies


def judge(tally: Tally, branch: Branch, recipe: Recipe, *, usable: bool) -> list[Problem]:
    """Whether enough of a file's rows can be used. ``usable``: rows could be encoded, so that none accepted means something."""
    where = f"branches.{branch.name}.prompts"
    problems = []
    if without := tally.rejected[NO_TEMPLATE]:
        what = f"tokenizer of {recipe.student} has no chat_template, which {without} rows of {branch.prompts} need"
        problems.append(Problem(where, what, "set prompts.chat_template or use `prompt` rows"))
    bad = tally.rejected.total() - without
    if bad > recipe.prompts.max_bad_row_fraction * tally.read:
        what = f"{bad} of {tally.read} rows of {branch.prompts} cannot be used ({bad / tally.read:.2%})"
        fix = f"mend the rows, or raise prompts.max_bad_row_fraction from {recipe.prompts.max_bad_row_fraction:g}"
        more = f"; the first {NUM_SHOWN} follow" if bad > NUM_SHOWN else ""
        problems += [Problem(where, what + more, fix), *tally.shown]
    if tally.overlong and recipe.prompts.overlong == "fail":
        what = f"{tally.overlong} of {tally.read} prompts of {branch.prompts} are too long"
        fix = "shorten them, or set prompts.overlong to skip or truncate_left"
        problems += [Problem(where, what, fix), *tally.shown_overlong]
    if usable and not tally.accepted and not problems:
        what = f"no prompt of {branch.prompts} is left: {tally.overlong} of {tally.read} are too long"
        problems.append(Problem(where, what, "raise prompts.max_prompt_tokens, lower rollout.max_new_tokens, or shorten them"))
    return problems


def remarks(tally: Tally, branch: Branch, recipe: Recipe) -> list[str]:
    """Sentences on what was done to the rows of a branch."""
    where = f"branches.{branch.name}.prompts"
    bad, needed = tally.rejected.total(), recipe.rollout.prompts_per_step
    said = {
        f"{bad} of {tally.read} rows could not be used": bad,
        f"{tally.overlong} prompts were longer than allowed ({recipe.prompts.overlong})": tally.overlong,
        f"{tally.notes['both fields']} rows have prompt and messages; messages was used": tally.notes["both fields"],
        f"{tally.notes['answer dropped']} rows ended with an assistant's turn, which was dropped": tally.notes[
            "answer dropped"
        ],
        f"{tally.accepted} prompts are fewer than rollout.prompts_per_step {needed}: a step uses some again": tally.accepted
        < needed,
    }
    return [f"{where}: {sentence}" for sentence, holds in said.items() if holds]
