"""Evaluation tasks as far as they can be known without lm-eval: which a folder holds, and their items when the data is local.

An item that is also a prompt of the recovery would be trained on, so the two are compared before anything is started.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment

from camopd.errors import Problem

_JINJA = SandboxedEnvironment(undefined=jinja2.StrictUndefined)


@dataclass(frozen=True)
class TaskFile:
    """One YAML file: what it configures, with its ``include`` applied."""

    path: Path
    config: Mapping[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML of lm-eval: ``!function data.load`` names code, which is neither needed nor run here."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def read_task_files(folder: Path) -> tuple[list[TaskFile], list[Problem]]:
    """All YAML files of a task folder, and those that are not YAML."""
    files, problems = [], []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            files.append(TaskFile(path, _config(path)))
        except (yaml.YAMLError, UnicodeDecodeError, OSError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            problems.append(Problem(where, "is not a YAML task of lm-eval", "see lm-eval's guide to new tasks"))
    return files, problems


def _config(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    if not isinstance(config, dict):
        raise ValueError("not a mapping")
    included = path.parent / str(config.get("include", ""))
    if "include" in config and included not in below:
        config = {**_config(included, (*below, path)), **config}
    return config


def leaves(name: str, files: Sequence[TaskFile], above: tuple[str, ...] = ()) -> list[TaskFile]:
    """The tasks behind a name: itself, the members of a group, or those with a tag. Empty when there is no such name."""
    found: list[TaskFile] = []
    for file in files:
        task, tag = file.config.get("task"), file.config.get("tag")
        if name == task or name in (tag if isinstance(tag, list) else [tag]):
            found.append(file)
        elif name == file.config.get("group") and name not in above:
            members = [m.get("task") if isinstance(m, dict) else m for m in (task if isinstance(task, list) else [task])]
            found += [leaf for m in members if isinstance(m, str) for leaf in leaves(m, files, (*above, name))]
    return found


def check_tasks(names: Mapping[str, Sequence[str]], files: Sequence[TaskFile]) -> list[Problem]:
    """Every named task must be in the folder.

    Args:
        names: task names by the parameter that names them.
        files: of ``evaluate.task_dir``.
    """
    held = {
        str(value) for file in files for value in (file.config.get("task"), file.config.get("group")) if isinstance(value, str)
    }
    fix = f"evaluate.task_dir has {', '.join(sorted(held)) or 'no tasks'}"
    return [
        Problem(where, f"there is no task {task!r}", fix)
        for where, tasks in names.items()
        for task in tasks
        if not leaves(task, files)
    ]


def fingerprint(text: str) -> bytes:
    """The same for two texts that differ in case and blanks alone."""
    return blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def evaluation_items(tasks: Sequence[str], files: Sequence[TaskFile]) -> tuple[dict[bytes, str], list[Problem]]:
    """Fingerprint of each item's question, with its task, for tasks over local JSON; and data files that are missing."""
    items: dict[bytes, str] = {}
    problems = []
    for task in tasks:
        for file in leaves(task, files):
            for path in _data_files(file):
                try:
                    items |= {fingerprint(text): task for row in _rows(path) for text in _questions(file.config, row)}
                except (OSError, ValueError, TypeError, jinja2.TemplateError) as error:
                    reason = (
                        "is missing"
                        if isinstance(error, FileNotFoundError)
                        else f"does not fit the task ({type(error).__name__})"
                    )
                    problems.append(Problem(str(file.path), f"its data {path} {reason}", "correct data_files or doc_to_text"))
    return items, problems


def _data_files(file: TaskFile) -> list[Path]:
    """Local data of the task's evaluation split; relative names are relative to the YAML file."""
    files = (file.config.get("dataset_kwargs") or {}).get("data_files")
    if file.config.get("dataset_path") != "json" or files is None:
        return []
    if isinstance(files, dict):
        split = file.config.get("test_split") or file.config.get("validation_split")
        files = files.get(split, [])
    names = [files] if isinstance(files, str) else files
    return [file.path.parent / name for name in names if "://" not in name and "*" not in name]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as handle:
        first = handle.read(1)
        handle.seek(0)
        rows = json.load(handle) if first == "[" else (json.loads(line) for line in handle if line.strip())
        yield from (row for row in rows if isinstance(row, dict))


def _questions(config: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """What a model is asked; every text of the row where code makes the question."""
    wanted = config.get("doc_to_text")
    if isinstance(wanted, str):
        return [str(row[wanted]) if wanted in row else _JINJA.from_string(wanted).render(dict(row))]
    return [value for value in row.values() if isinstance(value, str) and value.strip()]
