"""Local folders and s3:// prefixes behind one small interface, and what makes a prefix finished.

A stage writes one prefix and its ``manifest.json`` last; a prefix without a manifest does not exist. No stage ever deletes
anything but what training keeps for its own restart and what a killed attempt left in a local folder (`camopd gc` is no
stage), and names that begin with a dot (``.git``, ``.cache``, half-written files) are nobody's content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from camopd import __version__
from camopd.errors import MissingError, StoreError
from camopd.runtime import accelerators, together
from camopd.store.copies import Copies
from camopd.store.local import LocalBackend, content_of, local_path, scratch
from camopd.store.manifest import MANIFEST, FileInfo, Manifest, canonical, content_id_of, digest, sha256_file
from camopd.store.prefetch import Prefetcher
from camopd.store.protocols import Alone, Backend, Sending, Writers
from camopd.store.sweeper import Sweeper
from camopd.store.uris import check_uri, is_s3, join, parent

__all__ = [
    "MANIFEST",
    "Backend",
    "Copies",
    "FileInfo",
    "Manifest",
    "Store",
    "canonical",
    "check_uri",
    "content_id_of",
    "digest",
    "is_s3",
    "join",
    "parent",
    "sha256_file",
]

_BLOCK = 64 << 20  # bytes read at once where a whole file need not be in memory
_FILE, _FOLDER = "file", "folder"  # in place of a stage's name in the manifest of what came from elsewhere


class Store:
    """Reads and writes by URI, local or s3://, and knows what a finished prefix is.

    Args:
        s3: what answers for s3:// URIs; none means ``camopd.store.s3.S3Backend``, made when the first such URI is used.
        cache: folder of downloads; none means CAMOPD_CACHE, else ``camopd`` in the user's cache folder. It may be removed
            whenever no stage is at work.
    """

    def __init__(self, *, s3: Backend | None = None, cache: Path | None = None) -> None:
        self._local = LocalBackend()
        self._s3 = s3
        self._cache = cache or _default_cache()
        self._clock = threading.local()  # a thread that saves beside the training waits for nobody but itself
        self._prefetcher = Prefetcher(self._fetch_remote)
        self._sending: dict[Path, Sending] = {}

    def waited(self) -> float:
        """Seconds that this thread has waited for transfers, until now."""
        return getattr(self._clock, "waited", 0.0)

    @contextlib.contextmanager
    def _stopping_prefetches(self) -> Iterator[None]:
        """Where a stage fails or is interrupted, nobody waits for what it would have needed next."""
        try:
            yield
        except BaseException:
            self._prefetcher.stop()
            raise

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self._clock.waited = self.waited() + time.monotonic() - begun

    def _backend(self, uri: str) -> Backend:
        if not is_s3(uri):
            return self._local
        if self._s3 is None:
            from camopd.store.s3 import S3Backend  # here, since boto3 takes 135 ms to import

            self._s3 = S3Backend()
        return self._s3

    def sweeper(self, uri: str) -> Sweeper:
        """What sees and removes single files at a location: for `camopd gc`."""
        return self._backend(uri).sweeper()

    def stat(self, uri: str) -> FileInfo | None:
        """The file of exactly this URI, or None."""
        return self._backend(uri).stat(uri)

    def list(self, uri: str) -> Sequence[FileInfo]:
        """The content below the prefix, sorted by name: without its own manifest and without hidden names."""
        return self._backend(uri).list(uri)

    def read(self, uri: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file. Raises MissingError when there is none."""
        return self._backend(uri).read(uri, start, length)

    def write(self, uri: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write a small file in one piece; False when it was there and ``if_absent`` was asked for."""
        return self._backend(uri).write(uri, data, if_absent=if_absent)

    def remove(self, uri: str) -> bool:
        """Delete a file, or a prefix with all that lies below it, its manifest first. False where that is not allowed.

        For what training keeps for its own restart; nothing else of a finished prefix is ever deleted.
        """
        return self._backend(uri).remove(uri)

    def manifest(self, uri: str) -> Manifest | None:
        """The manifest of a finished prefix, or None: then the prefix does not exist. Raises StoreError for a broken one."""
        place = join(uri, MANIFEST)
        try:
            return Manifest.from_json(self.read(place))
        except MissingError:
            return None
        except (ValueError, TypeError) as error:
            raise StoreError(f"{place} is broken ({error}); restore it, or remove {uri} to have it made again") from error

    def require(self, uri: str) -> Manifest:
        """The manifest of a prefix that must be finished. Raises StoreError that names the missing one."""
        manifest = self.manifest(uri)
        if manifest is None:
            raise StoreError(f"{uri} is not finished (it has no {MANIFEST}); run the stage that writes it first")
        return manifest

    def content_id(self, uri: str) -> str:
        """Identity of a file or a prefix: by its manifest, else by names, sizes and sha256 (local) or ETags (S3).

        Raises MissingError when nothing is there.
        """
        return self._described(uri).content_id

    def _described(self, uri: str) -> Manifest:
        """The manifest of a finished prefix, or one made up for a file or folder that came from elsewhere."""
        file = self.stat(uri)
        manifest = None if file else self.manifest(uri)
        if manifest is not None:
            return manifest
        files = [self._known(uri, file)] if file else self.list(uri)
        if not files:
            raise MissingError(f"{uri}: nothing is there; check its spelling")
        if not is_s3(uri):
            root = local_path(uri)
            files = [replace(f, sha256=sha256_file(root if file else root / f.name)) for f in files]
        return Manifest(_FILE if file else _FOLDER, content_id_of(files), tuple(files))

    def _known(self, uri: str, file: FileInfo) -> FileInfo:
        """The file with the sha256 that the manifest beside it tells, if there is one and it may be read."""
        with contextlib.suppress(StoreError):
            manifest = self.manifest(parent(uri))
            for known in manifest.files if manifest else ():
                if (known.name, known.size) == (file.name, file.size):
                    return known
        return file

    def verify(self, uri: str, *, deep: bool = False) -> Sequence[str]:
        """What differs between a finished prefix and its manifest: missing files and sizes, with ``deep`` also sha256."""
        manifest = self.require(uri)
        present = {f.name: f for f in self.list(uri)}
        wrong = []
        for want in manifest.files:
            have, place = present.get(want.name), join(uri, want.name)
            if have is None:
                wrong.append(f"{place} is missing")
            elif have.size != want.size:
                wrong.append(f"{place} has {have.size} bytes, its manifest says {want.size}")
            elif deep and self._sha256(place, have.size) != want.sha256:
                wrong.append(f"{place} has another sha256 than its manifest says")
        return wrong

    def _sha256(self, uri: str, size: int) -> str:
        """Of what lies in the store now, so not by way of the cache."""
        hasher = hashlib.sha256()
        for start in range(0, size, _BLOCK):
            hasher.update(self.read(uri, start, _BLOCK))
        return hasher.hexdigest()

    def fetch(self, uri: str) -> Path:
        """A local path with the file's or the prefix's content: itself when local, else a verified copy in the cache.

        Raises StoreError when nothing is there, or when sizes or sha256 differ from the manifest (a download is tried twice).
        """
        if is_s3(uri):
            coming = self._prefetcher.take(uri)
            with self._waiting():
                return self._fetch_remote(uri) if coming is None else coming.result()
        if not local_path(uri).exists():
            raise MissingError(f"{uri}: there is no such file or folder; check its spelling")
        if self.manifest(uri) is not None and (wrong := self.verify(uri)):
            raise StoreError(f"{uri} is damaged: {'; '.join(wrong)}; remove it to have it made again")
        return local_path(uri)

    def prefetch(self, uri: str) -> None:
        """Begin to get what will be fetched soon, behind what was named before. Whatever goes wrong is raised by ``fetch``."""
        if is_s3(uri):
            self._prefetcher.begin(uri)

    def _fetch_remote(self, uri: str, stop: threading.Event | None = None) -> Path:
        """Copies lie under their content id and are prefixes like others: one without a manifest does not exist."""
        wanted = self._described(uri)
        is_file = wanted.stage == _FILE
        place = self._place(wanted.files)  # the manifest's own word may be anything
        if self.manifest(str(place)) is not None and self.verify(str(place)):
            shutil.rmtree(place)  # a cleaner of old files was here
        if self.manifest(str(place)) is None:
            with scratch(self._cache) as folder:
                self._download({uri if is_file else join(uri, file.name): file for file in wanted.files}, folder, stop)
                if self._described(uri) != wanted:
                    raise StoreError(f"{uri} changed while it was downloaded; start again when nobody writes there")
                (folder / MANIFEST).write_text(wanted.to_json(), encoding="utf-8")
                self._local.publish(folder, str(place))
        return place / wanted.files[0].name if is_file else place

    def _place(self, files: Sequence[FileInfo]) -> Path:
        """Where a copy of these files lies in the cache."""
        return self._cache / content_id_of(files).removeprefix("sha256:")

    def _download(self, files: Mapping[str, FileInfo], folder: Path, stop: threading.Event | None) -> None:
        """Get files and compare them with what is known of them, each while later ones come; those that differ twice."""
        for uri, file in files.items():
            if not {"", ".", ".."}.isdisjoint(file.name.split("/")):
                raise StoreError(f"{uri} cannot be a file below a folder; rename the object")
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        left, found = list(files), ""  # never none: a prefix without files is not there
        for _ in range(2):
            wrong = []
            targets = {uri: folder / files[uri].name for uri in left}
            with contextlib.closing(self._backend(left[0]).download(targets, stop)) as coming:
                for uri in coming:
                    file, size = files[uri], targets[uri].stat().st_size
                    if size == file.size and file.sha256 in ("", sha256_file(targets[uri])):
                        continue
                    found = f"{size} bytes, not {file.size}" if size != file.size else "another sha256 than its manifest says"
                    targets[uri].unlink()
                    wrong.append(uri)
            left = wrong
            if not left:
                return
        raise StoreError(f"{left[-1]} was downloaded twice and has {found}; have it written again")

    def send(self, path: Path) -> None:
        """Let a file of the folder that ``produce`` gave to a stage go up now: it will not change any more."""
        for folder, sending in self._sending.items():
            if path.is_relative_to(folder):
                sending.add(path)

    def produce(
        self,
        uri: str,
        *,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        write: Callable[[Path], Mapping[str, Any]],
        writers: Writers | None = None,
        copies: Copies | None = None,
        keep: bool = True,
    ) -> Manifest:
        """Make the prefix by ``write(folder) -> metrics`` unless it is finished already; the manifest goes last.

        A killed attempt leaves no manifest, so the next one starts the stage again; a finished one is returned at once. When
        two make the same prefix at once, the first to finish counts, and both return its manifest.

        Several processes may write one prefix together, each its own files: all call this alike, each fills a folder of its
        own, and the first writes one manifest when the files of all are there. They share nothing but the store.

        Args:
            uri: the prefix the stage writes.
            stage: its name, one of the seven words.
            config: the settings that shape the content.
            inputs: content id of each input.
            write: fills an empty local folder and returns the headline numbers (they are not part of the content).
            writers: this process among those that write the prefix, if there are several; the first one's numbers count.
            copies: files of a finished prefix that become part of this one: links on a disk, copied by the server on S3.
            keep: leave what goes to S3 in the cache, too, so that it need not be fetched where it was made; never with copies.

        Raises:
            StoreError: the prefix was made from other inputs or another configuration.
            DamagedError: a copy is not what the manifest of its prefix says.
        """
        config, inputs = canonical(config), canonical(inputs)
        writers = writers or Alone()
        done = self.finished(uri, stage=stage, config=config, inputs=inputs)
        if all(writers.gather(done is not None)):
            return done or self.require(uri)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._stopping_prefetches())
            folder = stack.enter_context(scratch(self._cache if is_s3(uri) else local_path(uri).parent))
            sending = self._sending[folder] = stack.enter_context(self._backend(uri).sending(folder, uri))
            stack.callback(self._sending.pop, folder)
            begun, waited = time.monotonic(), self.waited()
            metrics = canonical(write(folder))
            taken = copies.bring(folder, uri, self._backend(uri), self._sha256) if copies else []
            content = content_of(folder)
            for _, path in content:
                sending.add(path)
            own = taken + [FileInfo(name, path.stat().st_size, sha256_file(path)) for name, path in content]  # while they go up
            if copies:
                copies.compare(self.require(copies.uri), own)
            with self._waiting():
                sent = sending.wait()
            said = {"folder": str(folder), "files": [[file.name, file.size, file.sha256] for file in own]}
            parts = writers.gather(said | {"machine": platform.node(), "held": accelerators(stage)})
            manifest, published = None, False
            if writers.rank == 0:
                spent = round(time.monotonic() - begun, 3), round(self.waited() - waited, 3)
                manifest = _joined(Manifest(stage, "", (), config, inputs, metrics, *spent), parts)
                (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
                others = [Path(part["folder"]) for part in parts[1:]]
                published = sent and self._backend(uri).publish(folder, uri, others)
            writers.gather(None)  # nobody's folder goes before its files are taken
            if manifest and published:
                if keep and not copies and is_s3(uri) and len(parts) == 1:
                    self._local.publish(folder, str(self._place(manifest.files)))
                return manifest
        return self.finished(uri, stage=stage, config=config, inputs=inputs) or self.require(uri)

    def finished(self, uri: str, *, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Manifest | None:
        """The manifest of the prefix when it is finished, or None. Raises StoreError when it was made by anything but this."""
        config, inputs = canonical(config), canonical(inputs)
        done = self.manifest(uri)
        if done is None:
            if self.stat(join(uri, MANIFEST)) is not None:
                raise StoreError(f"{join(uri, MANIFEST)} was not written by a stage of ours; choose another output")
            return None
        asked, made = _made_by(stage, config, inputs), _made_by(done.stage, done.config, done.inputs)
        if asked != made:
            names = ", ".join(sorted(key for key in asked.keys() | made.keys() if asked.get(key) != made.get(key)))
            raise StoreError(f"{uri} was made with another {names}; remove it or choose another output")
        return done


def _made_by(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    flat = {f"config.{key}": value for key, value in config.items()} | {f"inputs.{key}": value for key, value in inputs.items()}
    return {"stage": stage, **flat}


def _joined(blank: Manifest, parts: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest of a prefix, with the files and the machines of everybody who wrote it."""
    files = tuple(sorted((FileInfo(*file) for part in parts for file in part["files"]), key=lambda file: file.name))
    return replace(
        blank,
        content_id=content_id_of(files),
        files=files,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        software=_software(),
        resources=together((part["machine"], part["held"]) for part in parts),
    )


def _software() -> dict[str, str]:
    image = os.environ.get("CAMOPD_IMAGE_DIGEST")
    return {"camopd": __version__, "python": platform.python_version()} | ({"image_digest": image} if image else {})


def _default_cache() -> Path:
    if chosen := os.environ.get("CAMOPD_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "camopd"
