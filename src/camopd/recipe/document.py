"""A recipe's text: where it lies, what it says, and on which physical line each key stands."""

from __future__ import annotations

import json
import os
import posixpath
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from camopd.errors import InputError, Problem, StoreError
from camopd.store import Store
from camopd.store.uris import check_uri, is_s3, parent

KeyPath = tuple[str | int, ...]  # ("branches", 0, "mass")

SHIPPED = Path(__file__).resolve().parents[3] / "recipes"  # those of the images, where an editable install keeps them


@dataclass(frozen=True)
class Document:
    """A parsed TOML recipe.

    Attributes:
        label: what messages call it: ``micro.toml`` or ``recipe``.
        text: the TOML itself.
        base: folder or s3:// prefix that relative locations are relative to.
        values: the parsed tables.
    """

    label: str
    text: str
    base: str
    values: dict[str, Any]

    @cached_property
    def lines(self) -> dict[KeyPath, int]:
        return key_lines(self.text)

    def where(self, path: KeyPath, name: str) -> str:
        """``micro.toml:12 (train.learning_rate)``; a key that is not there is placed at the table that lacks it."""
        line = next((self.lines[path[:depth]] for depth in range(len(path), 0, -1) if path[:depth] in self.lines), None)
        return f"{self.label}:{line} ({name})" if line else f"{self.label} ({name})"


def read_document(source: str | Path, store: Store) -> Document:
    """Find and parse a recipe.

    Args:
        source: TOML text (it has a newline and '='), an s3:// URI, a path, or the name of a recipe in ./recipes.
        store: reads s3:// URIs.

    Raises:
        InputError: nothing is there, it is not UTF-8, or it is not TOML; names the line.
    """
    if isinstance(source, str) and "\n" in source and "=" in source:
        return _parse("recipe", source, str(Path.cwd()))
    if isinstance(source, str) and re.match(r"s3a?://", source, re.IGNORECASE):
        return _from_store(source, store)
    path = _named(str(source)) or Path(source).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        known = sorted(p.stem for folder in _recipe_folders() for p in folder.glob("*.toml"))
        fix = "give a TOML file, an s3:// URI" + (f", or one of {', '.join(dict.fromkeys(known))}" if known else "")
        raise InputError([Problem(str(source), f"the recipe cannot be read ({error.strerror})", fix)]) from error
    return _parse(path.name, _decode(path.name, content), str(path.resolve().parent))


def absolute(location: str, base: str) -> str:
    """Resolve ``./``, ``../`` and ``~/`` against a folder or an s3:// prefix; any other text comes back as it is."""
    if location == "~" or location.startswith("~/"):
        return str(Path(location).expanduser())
    if location not in (".", "..") and not location.startswith(("./", "../")):
        return location
    if is_s3(base):
        return "s3://" + posixpath.normpath(posixpath.join(base.removeprefix("s3://"), location))
    return os.path.normpath(os.path.join(base, location))


def key_lines(text: str) -> dict[KeyPath, int]:
    """Physical line, from 1, on which the statement of each key begins.

    tomllib keeps no positions, so ever longer beginnings of the text are parsed: a beginning that parses ends with a whole
    statement, and the keys that it has and the one before it had not were written by that statement.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    found: dict[KeyPath, int] = {}
    begin = 1
    for number in range(1, len(lines) + 1):
        try:
            values = tomllib.loads("\n".join(lines[:number]))
        except tomllib.TOMLDecodeError:
            continue
        for path in _paths(values):
            found.setdefault(path, begin)
        begin = number + 1
    return found


def to_toml(values: Mapping[str, Any]) -> str:
    """A recipe's tables as TOML text; comments of the text that they were parsed from are lost."""
    return "\n".join(_toml_lines(values, ())).lstrip("\n") + "\n"


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    yield from (f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items() if not _is_tables(value))
    for key, value in table.items():
        header = ".".join(map(_toml_key, (*path, key)))
        if isinstance(value, dict):
            yield from ("", f"[{header}]", *_toml_lines(value, (*path, key)))
        elif _is_tables(value):
            for entry in value:
                yield from ("", f"[[{header}]]", *_toml_lines(entry, (*path, key)))


def _is_tables(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and all(isinstance(e, dict) for e in value))


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, str):  # JSON's escapes are TOML's, but for the one control character that JSON leaves alone
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return str(value)  # numbers, dates and times


def _paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from _paths(entry, (*path, key))


def _recipe_folders() -> tuple[Path, Path]:
    return Path("recipes"), SHIPPED


def _named(name: str) -> Path | None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        return None
    return next((path for folder in _recipe_folders() if (path := folder / f"{name}.toml").is_file()), None)


def _from_store(uri: str, store: Store) -> Document:
    try:
        uri = check_uri(uri)
        content = store.read(uri)
    except (ValueError, StoreError) as error:
        raise InputError([Problem(uri, f"the recipe cannot be read ({error})", "give the s3:// URI of a TOML file")]) from error
    label = uri.rpartition("/")[2]
    return _parse(label, _decode(label, content), parent(uri))


def _decode(label: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError([Problem(f"{label}:{line}", "the recipe is not UTF-8", "save it as UTF-8")]) from error


def _parse(label: str, text: str, base: str) -> Document:
    try:
        return Document(label, text, base, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(place.group(1)) if place else text.count("\n") + 1  # "at end of document"
        reason = re.sub(r" \(at .*\)$", "", str(error))
        raise InputError(
            [Problem(f"{label}:{line}", f"not TOML: {reason}", 'write key = "value"; text stands in quotes')]
        ) from error
