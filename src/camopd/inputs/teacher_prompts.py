"""Prompts that a teacher writes itself (Magpie, arXiv:2406.08464): sampled from the bare user turn of its own chat template.

The data that a teacher was trained on are unknown, and any list of proxy prompts leaves kinds of them out. An instruct model
that is given only the start of a user turn goes on with what its users ask. Not every sample is a prompt, so each is filtered;
what is left is rendered by the student's encoder like the rows of a prompt file, and no later stage sees a difference.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from camopd.engines import Engine, Sample
from camopd.errors import InputError, Problem, UnhealthyRunError
from camopd.inputs.prompts import Prompt, Rejected
from camopd.inputs.tasks import fingerprint
from camopd.inputs.tokens import Encoded, Encoder
from camopd.schedule import seed_of

SAMPLES_PER_PROMPT = 5  # samples that are tried, at most, for each prompt that is wanted
MAX_NEW_TOKENS = 1024  # of one sample: a longer one has nearly always lost its way

# --- The user turn --------------------------------------------------------------------------------------------------------

_PLACEHOLDER = "CamopdPlaceholder7"  # no template writes it by itself
_USE_A_FILE = "use a prompt file for this branch, or a teacher with another template"


@dataclass(frozen=True)
class UserTurn:
    """What a teacher continues with a prompt.

    Attributes:
        ids: the start of a conversation up to the user's first word, a system prompt of the template's own included.
        end: the token that the template puts after the user's last word.
        markers: special tokens, and other added tokens of the template, with their text. A prompt holds none of them.
    """

    ids: list[int]
    end: int
    markers: Mapping[int, str]


def user_turn(tokenizer: PreTrainedTokenizerFast, where: str, *, enable_thinking: bool | None) -> UserTurn:
    """Cut the user turn out of the model's own chat template.

    Tokens are cut, not text: where the first word takes the blank before it into its token, the turn ends before that blank.

    Args:
        tokenizer: the teacher's.
        where: the parameter that names the teacher, for messages.
        enable_thinking: passed to the template; None leaves it undefined there.

    Raises:
        InputError: the template does not write the message once and unchanged, or has nothing before or after it.
    """
    text = _rendered(tokenizer, where, enable_thinking)
    if text.count(_PLACEHOLDER) != 1:
        found = "more than once" if _PLACEHOLDER in text else "not at all, or changed"
        raise InputError([Problem(where, f"its chat template writes the user's message {found}", _USE_A_FILE)])
    start = text.index(_PLACEHOLDER)
    stop = start + len(_PLACEHOLDER)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    places = list(zip(encoding.ids, encoding.offsets, strict=True))
    markers = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and (token.special or number in encoding.ids)
    }
    ids = [number for number, (_, last) in places if last <= start]
    end = next((number for number, (first, _) in places if first >= stop and number in markers), None)
    if not ids:
        what = "its chat template puts nothing before the user's message, so there is nothing to continue"
        raise InputError([Problem(where, what, _USE_A_FILE)])
    if end is None:
        what = "its chat template puts no special token after the user's message, so no prompt would end"
        raise InputError([Problem(where, what, _USE_A_FILE)])
    return UserTurn(ids, end, markers)


def _rendered(tokenizer: PreTrainedTokenizerFast, where: str, enable_thinking: bool | None) -> str:
    """One user message with the start of the answer, which some templates need to end the turn."""
    try:
        encoder = Encoder(tokenizer, chat_template=None, enable_thinking=enable_thinking)
    except ValueError as error:
        raise InputError([Problem(where, str(error), _USE_A_FILE)]) from error
    ((item,),) = encoder.encode([[Prompt("", 1, None, ({"role": "user", "content": _PLACEHOLDER},))]])
    if isinstance(item, Rejected):
        reason = item.reason + (f" ({item.detail})" if item.detail else "")
        raise InputError([Problem(where, f"a user's message alone cannot be rendered: {reason}", _USE_A_FILE)])
    return item.text


# --- Filters --------------------------------------------------------------------------------------------------------------

CUT = "cut at the length limit"
MARKER = "special token inside"
OVERLONG = "too many tokens"
HELD_OUT = "evaluation item"
KNOWN = "in the prompt file"
DUPLICATE = "duplicate"

_MIN_ALPHANUMERIC = 3
_MIN_REPEATS = 4
_LONG_TEXT = 200  # bytes from which zlib tells something
_MAX_COMPRESSION = 4  # times; English prose and Python of a few thousand bytes stay below 3


def flaw(text: str, markers: Sequence[str] = ()) -> str | None:
    """Why a stripped text is no prompt, by the first reason that holds; None when it may be one.

    Args:
        text: what the teacher wrote.
        markers: text of the tokens that the encoder would read as special.
    """
    if any(marker in text for marker in markers):
        return MARKER
    if not text:
        return "empty"
    if any(char == "\ufffd" or (unicodedata.category(char) == "Cc" and not char.isspace()) for char in text):
        return "broken characters"
    alphanumeric = sum(map(str.isalnum, text))
    if not alphanumeric:
        return "no letters or digits"
    if alphanumeric < _MIN_ALPHANUMERIC:
        return "too short"
    words = tuple(text.casefold().split())
    if repeats(words) or repeats("".join(words)) or compresses(text):
        return "repetitive"
    return None


def repeats(units: str | tuple[str, ...]) -> bool:
    """Whether one character or word, or two or three in a row, come back until they cover more than half of a text."""
    for size in (1, 2, 3):
        starts = defaultdict(list)
        for start in range(len(units) - size + 1):
            starts[units[start : start + size]].append(start)
        most = max(starts.values(), key=len, default=[])
        covered = {start + offset for start in most for offset in range(size)}  # once, also where they overlap
        if len(most) >= _MIN_REPEATS and 2 * len(covered) > len(units):
            return True
    return False


def compresses(text: str) -> bool:
    """Whether zlib makes so little of a long text that whole sentences must come back in it."""
    data = text.encode()
    return len(data) >= _LONG_TEXT and len(data) > _MAX_COMPRESSION * len(zlib.compress(data, 9))


def read_sample(sample: Sample, turn: UserTurn, encoder: Encoder, *, branch: str, number: int) -> Prompt | Rejected:
    """A sample as a row of a prompt file would be read; ``number`` counts samples from 1."""
    own = f"teacher-{branch}-{number}"
    if sample.finish_reason == "length":
        return Rejected(number, CUT, own)
    ids = sample.token_ids.tolist()
    # Sampling stops at any marker. One that is not the end of the turn stays in the text, where it is found.
    text = encoder.decode(ids[:-1] if ids[-1] == turn.end else ids).strip()
    reason = flaw(text, tuple(turn.markers.values()))
    return Rejected(number, reason, own) if reason else Prompt(own, number, None, ({"role": "user", "content": text},))


# --- Making them ----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the samples.

    Attributes:
        asked: samples looked at, up to the last one that was needed.
        accepted: prompts made of them.
        rejected: the others by reason.
    """

    asked: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def headline(self) -> dict[str, float]:
        """Numbers for the run's metrics."""
        rejected = {f"rejected/{reason}": count for reason, count in sorted(self.rejected.items())}
        return {"asked": self.asked, "accepted": self.accepted, **rejected}

    def summary(self) -> str:
        """One sentence with the share of each: ``300 of 500 samples are prompts (60.0%); duplicate 200 (40.0%)``."""
        reasons = [f"{reason} {count} ({count / self.asked:.1%})" for reason, count in self.rejected.most_common()]
        kept = f"{self.accepted} of {self.asked} samples are prompts ({self.accepted / max(self.asked, 1):.1%})"
        return "; ".join([kept, ", ".join(reasons)]) if reasons else kept


def make_prompts(
    branch: str,
    *,
    engine: Engine,
    turn: UserTurn,
    encoder: Encoder,
    count: int,
    limit: int,
    seed: int,
    held_out: Container[bytes],
    known: Container[bytes],
    write: Callable[[Sequence[Mapping[str, Any]]], None],
    progress: Callable[[int], None],
    batch_size: int = 256,
) -> Tally:
    """Sample, filter, render and write prompts of the teacher's own, batch by batch, until there are ``count``.

    Sample i has a seed of (seed, branch, i), and samples are looked at in that order, so the prompts and their tally depend on
    neither batches nor time.

    Args:
        branch: whose prompts these are.
        engine: the teacher.
        turn: of the teacher's template.
        encoder: the student's, with the template that renders the prompt files, too.
        count: prompts wanted.
        limit: longest rendered prompt in tokens.
        seed: the recipe's.
        held_out: fingerprints of the evaluation items' questions.
        known: fingerprints of the branch's prompts from a file, see ``known_prompts``.
        write: takes the rows of a ``prompts`` table.
        progress: told of new prompts.
        batch_size: samples that the engine is asked for at once.

    Returns:
        What became of the samples; fewer than ``count`` are accepted when ``SAMPLES_PER_PROMPT * count`` samples give no more.

    Raises:
        InputError: the user turn leaves no room for a prompt.
        UnhealthyRunError: those samples do not give even half of ``count``.
    """
    room = min(limit - len(turn.ids), MAX_NEW_TOKENS)
    if room < 1:
        what = f"the teacher's user turn takes {len(turn.ids)} tokens before the first word, and a prompt may have {limit}"
        fix = "raise prompts.max_prompt_tokens, or lower rollout.max_new_tokens"
        raise InputError([Problem(f"branches.{branch}", what, fix)])
    tally, seen = Tally(), set[bytes]()
    most = SAMPLES_PER_PROMPT * count
    for start in range(0, most, batch_size):
        numbers = range(start, min(start + batch_size, most))
        seeds = [seed_of(seed, "teacher-prompts", branch, number) for number in numbers]
        prompts = [turn.ids] * len(numbers)
        samples = dict(engine.sample(prompts, seeds, max_new_tokens=room, eos_ids=sorted(turn.markers)))
        read = [read_sample(samples[i], turn, encoder, branch=branch, number=n + 1) for i, n in enumerate(numbers)]
        (items,) = encoder.encode([read])
        rows = _accepted(items, count, limit, held_out, known, seen, tally)
        if rows:
            write(rows)
            progress(len(rows))
        if tally.accepted == count:
            break
    if 2 * tally.accepted < count:
        raise UnhealthyRunError(
            f"the teacher of branch {branch!r} wrote fewer than half of the {count} prompts wanted: {tally.summary()}; "
            "use a prompt file for this branch, or an instruct model as its teacher"
        )
    return tally


def _accepted(
    items: Sequence[Encoded | Rejected],
    count: int,
    limit: int,
    held_out: Container[bytes],
    known: Container[bytes],
    seen: set[bytes],
    tally: Tally,
) -> list[dict[str, Any]]:
    """The table's rows of one batch, until ``count`` are reached; adds to ``seen`` and ``tally``."""
    rows = []
    for item in items:
        if tally.accepted == count:
            break
        tally.asked += 1
        reason = item.reason if isinstance(item, Rejected) else refusal(item, limit, held_out, known, seen)
        if reason is not None:
            tally.rejected[reason] += 1
            continue
        assert isinstance(item, Encoded)
        tally.accepted += 1
        seen.add(fingerprint(item.prompt.question))
        rows.append({"prompt_id": item.prompt.id, "line": item.line, "text": item.text, "token_ids": item.ids})
    return rows


def refusal(
    item: Encoded, limit: int, held_out: Container[bytes], known: Container[bytes], seen: Container[bytes]
) -> str | None:
    """Why a prompt is not taken next to the others; None when it is. ``seen``: fingerprints of those taken before."""
    question = fingerprint(item.prompt.question)
    if len(item.ids) > limit:
        return OVERLONG
    if question in held_out:
        return HELD_OUT
    if fingerprint(item.text) in known:
        return KNOWN
    return DUPLICATE if question in seen else None


def known_prompts(path: Path) -> set[bytes]:
    """Fingerprints of the rendered prompts in a ``prompts`` table."""
    import pyarrow.parquet as pq

    return {fingerprint(text) for batch in pq.ParquetFile(path).iter_batches(columns=["text"]) for text in batch[0].to_pylist()}
