"""Files of one finished prefix that become part of another one, without their bytes coming here where the store can do that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from camopd.errors import DamagedError
from camopd.store.manifest import FileInfo, Manifest
from camopd.store.protocols import Backend
from camopd.store.uris import join


@dataclass(frozen=True)
class Copies:
    """What is copied from where.

    Attributes:
        uri: a finished prefix in the same store.
        names: name below the new prefix -> name below ``uri``.
    """

    uri: str
    names: Mapping[str, str]

    def bring(self, folder: Path, target: str, backend: Backend, sha256: Callable[[str, int], str]) -> list[FileInfo]:
        """Bring the files to the prefix ``target`` or into its folder; what lies at the prefix now, as it is read from there.

        Args:
            folder: what the new prefix is made from.
            target: the new prefix.
            backend: of both.
            sha256: of so many bytes at a location, as they lie there.
        """
        there = []
        for name, source in self.names.items():
            place, path = join(target, name), folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if backend.take(join(self.uri, source), place, path):
                size = copy.size if (copy := backend.stat(place)) else 0
                there.append(FileInfo(name, size, sha256(place, size)))
        return there

    def compare(self, manifest: Manifest, found: Iterable[FileInfo]) -> None:
        """Raises DamagedError where a copy is not what the manifest of ``uri`` says of it."""
        known = {file.name: (file.size, file.sha256) for file in manifest.files}
        have = {file.name: (file.size, file.sha256) for file in found}
        wrong = [join(self.uri, source) for name, source in self.names.items() if have[name] != known[source]]
        if wrong:
            raise DamagedError(f"{', '.join(wrong)}: the copy is not what the manifest there says; have it written again")
