"""What a finished prefix says about itself, and the identity of content.

A stage writes its ``manifest.json`` last; a prefix without one does not exist. That is the whole of resume, retry and cache
(docs/data.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileInfo:
    """A file below a prefix: its name relative to the prefix (POSIX separators), its size in bytes and what identifies it."""

    name: str
    size: int
    sha256: str = ""
    etag: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a stage wrote, and from what. ``content_id`` depends on the files alone; times and rates are in ``metrics``.

    ``seconds_waited`` of ``seconds`` went by while the stage waited for the store. ``resources`` are the accelerators that its
    processes held (``count``, ``name``); empty, and left out of the file, without any.
    """

    stage: str
    content_id: str
    files: tuple[FileInfo, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_waited: float = 0.0
    created_at: str = ""
    software: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        record = asdict(self)
        record["files"] = [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in self.files]
        if not self.resources:
            del record["resources"]
        return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest | None:
        """None for JSON of another make: a model folder may come with a ``manifest.json`` of its own.

        Raises ValueError or TypeError when it is broken.
        """
        record = json.loads(text)
        if not isinstance(record, dict) or not {"stage", "content_id", "files"} <= record.keys():
            return None
        return cls(**{**record, "files": tuple(FileInfo(**f) for f in record["files"])})


def canonical(value: Any) -> Any:
    """The value as it comes back from JSON, so that what was written compares equal to what is asked for."""
    return json.loads(json.dumps(value, sort_keys=True, allow_nan=False))


def digest(value: Any) -> str:
    """``sha256:`` and the hex digest of the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def content_id_of(files: Iterable[FileInfo]) -> str:
    """Identity of a set of files: names, sizes and sha256 (or, for objects that we did not write, the store's ETags)."""
    return digest(sorted((f.name, f.size, f.sha256 or "etag:" + f.etag) for f in files))


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
