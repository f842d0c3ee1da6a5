"""Reading prompt files: JSON Lines with ``prompt`` or ``messages``, plain or gzipped, one row at a time.

A bad row never hides a good one: each line comes out as a Prompt or as a Rejected with its physical line number and reason.
What is wrong with the file as a whole raises InputError. No message quotes a row's text.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from camopd.errors import InputError, Problem

MAX_ROW_BYTES = 16 << 20  # keeps memory bounded when a file has no line ends
ROLES = ("system", "user", "assistant")

_FOREIGN = {  # first bytes of what people hand in by mistake
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"version https://git-lfs": "a git-lfs pointer",
}


@dataclass(frozen=True)
class Prompt:
    """An accepted row.

    Attributes:
        id: the row's own id as text, or one made of its content.
        line: physical line, from 1.
        text: plain prompt; None where the row has messages.
        messages: turns with role and content, the last one the user's; empty where the row is a plain prompt.
        notes: what was done to it: ``both fields``, ``answer dropped``.
    """

    id: str
    line: int
    text: str | None
    messages: tuple[dict[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """What the user says last."""
        return self.messages[-1]["content"] if self.text is None else self.text


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used. ``reason`` is one of few, to count by; ``detail`` says more."""

    line: int
    reason: str
    id: str | None = None
    detail: str = ""

    def problem(self, location: str) -> Problem:
        named = f"id {self.id[:80]!r}: " if self.id is not None else ""
        return Problem(f"{location}:{self.line}", named + self.reason + (f" ({self.detail})" if self.detail else ""))


class _BadRowError(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_prompts(path: Path, location: str) -> Iterator[Prompt | Rejected]:
    """Read a prompt file in the order of its lines, in bounded memory but for a digest of each id.

    Rows are bytes up to LF, so that U+2028 or a CR inside a row does not end it. One byte-order mark at the start and a CR at a
    row's end are dropped, blank lines skipped. ``messages`` wins over ``prompt``; final assistant turns are dropped, since the
    student is to answer. A row without id gets one made of its content; the second row with an id is rejected.

    Args:
        path: local file.
        location: what messages call it.

    Raises:
        InputError: the file has no rows, is not JSON Lines at all, or its gzip data is damaged.
    """
    seen: dict[bytes, int] = {}
    number = 0
    with path.open("rb") as raw:
        rows = _rows(_uncompressed(raw), location)
        try:
            begin = list(itertools.islice(rows, 2))
            _refuse_one_document(begin, location)
            for number, row in itertools.chain(begin, rows):
                item = _item(number, row)
                if isinstance(item, Prompt):
                    first = seen.setdefault(blake2b(item.id.encode(), digest_size=16).digest(), number)
                    if first != number:
                        item = Rejected(number, "duplicate id", item.id, f"first on line {first}")
                yield item
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problem = Problem(location, f"its gzip data is damaged or cut off after line {number}", "copy the file again")
            raise InputError([problem]) from error
    if number == 0:
        raise InputError([Problem(location, "there are no prompts in this file", "give one JSON object a line")])


def count_lines(path: Path) -> int:
    """Physical lines of a prompt file, for a progress display."""
    with path.open("rb") as raw:
        handle = _uncompressed(raw)
        count, block = 0, b"\n"
        with contextlib.suppress(EOFError, gzip.BadGzipFile, zlib.error):  # reading the rows says what is wrong
            while more := handle.read(1 << 20):
                block = more
                count += block.count(b"\n")
        return count + (not block.endswith(b"\n"))


# --- File -----------------------------------------------------------------------------------------------------------------


def _uncompressed(raw: io.BufferedReader) -> io.BufferedIOBase:
    """By the first bytes, for names lie."""
    return gzip.GzipFile(fileobj=raw) if raw.peek(2).startswith(b"\x1f\x8b") else raw


def _rows(handle: io.BufferedIOBase, location: str) -> Iterator[tuple[int, bytes]]:
    """Physical line number and bytes of each row that is not blank; a row above the limit is cut just above it."""
    for number in itertools.count(1):
        line = rest = handle.readline(MAX_ROW_BYTES + 1)
        while rest and not rest.endswith(b"\n"):
            rest = handle.readline(MAX_ROW_BYTES)
        if not line:
            return
        if number == 1:
            _refuse_foreign(line, location)
            line = line.removeprefix(b"\xef\xbb\xbf")
        if row := line.strip():
            yield number, row


def _refuse_foreign(line: bytes, location: str) -> None:
    for magic, name in _FOREIGN.items():
        if line.startswith(magic):
            raise InputError([Problem(location, f"this is {name}", "give JSON Lines in UTF-8, plain or gzipped")])


def _refuse_one_document(begin: list[tuple[int, bytes]], location: str) -> None:
    """One JSON document over the whole file is a mistake of the file, not of each of its lines."""
    first = begin[0][1] if begin else b""
    if first.startswith(b"["):
        try:
            entries = json.loads(first)
        except (ValueError, RecursionError):
            entries = [{}]  # it goes on in the lines below
        whole = len(begin) == 1 or not entries or any(isinstance(entry, dict) for entry in entries)
        kind = "array"
    else:
        whole, kind = first == b"{", "object over several lines"
    if whole:
        raise InputError(
            [Problem(location, f"this is a JSON {kind}; one object a line is expected", "jq -c '.[]' makes it so")]
        )


# --- Row ------------------------------------------------------------------------------------------------------------------


def _item(number: int, row: bytes) -> Prompt | Rejected:
    own = None
    try:
        record = _record(row)
        own = _own_id(record)
        text, messages, notes = _content(record)
    except _BadRowError as bad:
        return Rejected(number, bad.reason, _leading_id(row) if own is None else own, bad.detail)
    if own is None:
        content = json.dumps(text if text is not None else messages, ensure_ascii=False)
        own = "row-" + sha256(content.encode()).hexdigest()[:16]
    return Prompt(own, number, text, messages, notes)


def _record(row: bytes) -> dict[str, Any]:
    if len(row) > MAX_ROW_BYTES:
        raise _BadRowError("row too long", f"more than {MAX_ROW_BYTES >> 20} MiB")
    try:
        record = _DECODER.decode(row.decode())
    except UnicodeDecodeError as error:
        raise _BadRowError("invalid UTF-8", f"at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise _BadRowError("truncated or invalid JSON", f"{error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise _BadRowError("truncated or invalid JSON", "a number of too many digits, or nested too deeply") from error
    if not isinstance(record, dict):
        raise _BadRowError("not an object", 'write {"prompt": "..."}')
    return record


def _refuse_constant(name: str) -> None:
    raise _BadRowError("NaN is not JSON", f"{name} in a field")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would make one for each row


def _own_id(record: Mapping[str, Any]) -> str | None:
    value = record.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadRowError("id is neither text nor a whole number")
    text = _encodable(str(value))
    if not text.strip():
        raise _BadRowError("blank id", "leave it out to have one made of the content")
    return text


_LEADING_ID = re.compile(r'\{\s*"id"\s*:\s*("(?:[^"\\]|\\.){0,200}"|-?\d{1,20})\s*[,}]')


def _leading_id(row: bytes) -> str | None:
    """The id of a row that is otherwise unreadable, when it stands first: elsewhere it could be part of a prompt."""
    found = _LEADING_ID.match(row[:1024].decode(errors="replace"))
    try:
        text = _encodable(str(json.loads(found.group(1)))) if found else ""
    except (ValueError, _BadRowError):
        return None
    return text if text and "\ufffd" not in text else None


def _content(record: Mapping[str, Any]) -> tuple[str | None, tuple[dict[str, str], ...], tuple[str, ...]]:
    """Plain prompt or messages, and notes."""
    prompt, messages = record.get("prompt"), record.get("messages")
    if messages is not None:
        turns, dropped = _turns(messages)
        notes = ("both fields",) * (prompt is not None) + ("answer dropped",) * dropped
        return None, turns, notes
    if prompt is None:
        if "prompt" in record or "messages" in record:
            raise _BadRowError("null prompt")
        raise _BadRowError("no known prompt field", "known are prompt and messages")
    if not isinstance(prompt, str):
        raise _BadRowError("prompt is not text", "a list of turns belongs in messages" if isinstance(prompt, list) else "")
    if not prompt.strip():
        raise _BadRowError("whitespace-only prompt")
    return _encodable(prompt), (), ()


def _turns(messages: Any) -> tuple[tuple[dict[str, str], ...], bool]:
    """The turns up to the user's last one, and whether assistant turns after it were dropped."""
    if not isinstance(messages, list):
        raise _BadRowError("messages is not a list")
    if not messages:
        raise _BadRowError("empty messages")
    kept = len(messages)
    while kept and isinstance(messages[kept - 1], dict) and messages[kept - 1].get("role") == "assistant":
        kept -= 1
    turns = tuple(_turn(message) for message in messages[:kept])
    if not turns or turns[-1]["role"] != "user":
        raise _BadRowError("no user turn to answer", "the last turn, but for an assistant's, must be the user's")
    if not turns[-1]["content"].strip():
        raise _BadRowError("whitespace-only prompt", "in the last user turn")
    return turns, kept < len(messages)


def _turn(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _BadRowError("a message is not an object")
    role, content = message.get("role"), message.get("content")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise _BadRowError("tool use is not supported", "give conversations of system, user and assistant text")
    if not isinstance(role, str) or role not in ROLES:
        shown = f"{role!r}; " if isinstance(role, str) and role.isidentifier() and len(role) <= 20 else ""
        raise _BadRowError("unknown role", f"{shown}roles are {', '.join(ROLES)}")
    if content is None:
        raise _BadRowError("null content")
    if isinstance(content, list | dict):
        raise _BadRowError("content in parts is not supported", "only text; images and audio cannot be used")
    if not isinstance(content, str):
        raise _BadRowError("content is not text")
    return {"role": role, "content": _encodable(content)}


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRowError("lone surrogate", "half of a UTF-16 pair cannot be written as UTF-8") from error
    return text
