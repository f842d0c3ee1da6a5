"""The prompt files of a recipe, read row by row and encoded once: which prompts can be used, and what became of the others."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from camopd.config import Branch, Recipe
from camopd.errors import InputError, Problem
from camopd.inputs.preflight import Findings
from camopd.inputs.prompts import Prompt, Rejected, count_lines, read_prompts
from camopd.inputs.tokens import NO_TEMPLATE, Encoded, Encoder
from camopd.plan import prompts_file
from camopd.progress import Progress
from camopd.records import open_table

NUM_SHOWN = 20  # reasons that a message lists
NUM_PROBES = 64  # prompts of a branch whose ids are compared between tokenizers
Write = Callable[[Sequence[Mapping[str, Any]]], None]  # a batch of rows into the table
_BATCH = 1024  # prompts encoded together; also a row group of the table, so that a step reads few rows it does not need


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
