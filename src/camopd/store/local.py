"""Folders of this machine as a store: files appear whole, writers take turns, and killed ones leave nothing that counts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path

from camopd.errors import MissingError, StoreError
from camopd.store.manifest import MANIFEST, FileInfo
from camopd.store.sweeper import LocalSweeper
from camopd.store.uris import join

_HIDDEN = ".camopd-"  # first letters of what is being written: not content yet


class Staying:
    """Files that are on the prefix's own file system: ``publish`` moves them."""

    def add(self, path: Path) -> None:
        pass

    def wait(self) -> bool:
        return True


class LocalBackend:
    """Folders of this machine. Each file appears whole, by a rename; a lock makes those who publish a prefix take turns."""

    def stat(self, uri: str) -> FileInfo | None:
        path = local_path(uri)
        with explained(uri):
            return FileInfo(path.name, path.stat().st_size) if path.is_file() else None

    def list(self, uri: str) -> Sequence[FileInfo]:
        with explained(uri):
            return [FileInfo(name, path.stat().st_size) for name, path in content_of(local_path(uri))]

    def read(self, uri: str, start: int = 0, length: int | None = None) -> bytes:
        with explained(uri), local_path(uri).open("rb") as handle:
            handle.seek(start)
            return handle.read() if length is None else handle.read(length)

    def write(self, uri: str, data: bytes, *, if_absent: bool = False) -> bool:
        path = local_path(uri)
        with explained(uri), _beside(path) as temporary:
            temporary.write_bytes(data)
            _flush(temporary)
            if not if_absent:
                os.replace(temporary, path)
                return True
            try:
                os.link(temporary, path)  # fails when the name exists: the local form of If-None-Match
            except FileExistsError:
                return False
            return True

    def download(self, targets: Mapping[str, Path], stop: threading.Event | None = None) -> Generator[str]:
        for uri, path in targets.items():
            with explained(uri):
                shutil.copyfile(local_path(uri), path)
            yield uri

    def take(self, source: str, target: str, path: Path) -> bool:
        origin = os.path.realpath(local_path(source))
        with explained(source):
            try:
                os.link(origin, path)  # files are replaced and never changed, so both may be one
            except FileNotFoundError:
                raise
            except OSError:  # another file system, one without links, or somebody else's file
                shutil.copyfile(origin, path)
        return False

    @contextlib.contextmanager
    def sending(self, folder: Path, uri: str) -> Iterator[Staying]:
        yield Staying()

    def publish(self, folder: Path, uri: str, shared: Sequence[Path] = ()) -> bool:
        root = local_path(uri)
        for other in shared:
            if not other.is_dir():
                raise StoreError(
                    f"{uri}: the part of another process, {other}, is not visible here; processes of several machines need a "
                    "folder that all of them see, or an s3:// output"
                )
        with explained(uri):
            root.mkdir(parents=True, exist_ok=True)
            with _lock(root):
                if (root / MANIFEST).exists():
                    return False
                content = [entry for part in (*shared, folder) for entry in content_of(part)]
                _remove_leftovers(root, {name for name, _ in content})
                for name, path in content:
                    _move(path, root / name)
                return self.write(join(uri, MANIFEST), (folder / MANIFEST).read_bytes(), if_absent=True)

    def remove(self, uri: str) -> bool:
        path = local_path(uri)
        try:
            for manifest in sorted(path.rglob(MANIFEST)):
                manifest.unlink()
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except PermissionError:
            return False
        except OSError as error:
            raise StoreError(f"{uri} could not be removed: {error.strerror} ({error.filename})") from error
        return True

    def sweeper(self) -> LocalSweeper:
        return LocalSweeper()


def content_of(root: Path) -> Sequence[tuple[str, Path]]:
    """Name and path of each file below a folder, as ``Backend.list`` defines them; links to folders are followed.

    A link that leads nowhere counts as a file, so that whoever needs its size or bytes meets a FileNotFoundError: a Hugging
    Face cache that lost its blobs is no model.
    """
    found: dict[str, Path] = {}

    def collect(folder: Path, prefix: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if real in above:  # a link to a folder that it lies in: nothing new is there
            return
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                collect(path, f"{prefix}{path.name}/", (*above, real))
            else:
                found[prefix + path.name] = path

    if root.is_dir():
        collect(root, "", ())
    found.pop(MANIFEST, None)
    return sorted(found.items())


def _remove_leftovers(root: Path, names: Collection[str]) -> None:
    """Delete what a killed attempt left below an unfinished prefix and this one does not write.

    Whoever opens the folder would take it for content. Hidden names, finished prefixes below this one, and what is behind a
    link to a folder are not its own.
    """
    for above, folders, files in os.walk(root):
        here = Path(above)
        folders[:] = [name for name in folders if not name.startswith(".") and not (here / name / MANIFEST).exists()]
        for path in (here / name for name in files if not name.startswith(".")):
            if path.relative_to(root).as_posix() not in names:
                path.unlink()


def local_path(uri: str) -> Path:
    return Path(uri).expanduser()


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn the operating system's errors into sentences about the location."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"{uri}: there is no such file or folder ({error.filename})") from error
    except OSError as error:
        raise StoreError(f"{uri}: {error.strerror} ({error.filename}); check the permissions and the space left") from error


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A hidden name next to ``path``, hence on the same file system; nothing is left of it afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_HIDDEN + secrets.token_hex(8))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the bytes on the disk before the manifest says that they are."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _move(path: Path, target: Path) -> None:
    """Rename a file; where it is a link, or the file system differs, copy it under a hidden name first."""
    with _beside(target) as copy:
        if path.is_symlink():
            path = Path(shutil.copyfile(path, copy))
        _flush(path)
        try:
            os.replace(path, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copyfile(path, copy)
            _flush(copy)
            os.replace(copy, target)


@contextlib.contextmanager
def _lock(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a folder against other processes; the kernel lets go of it when this one ends, however it ends.

    False: another holds it (without ``wait``), it is gone, or its file system has no locks, as some network ones.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch(above: Path) -> Iterator[Path]:
    """An empty hidden folder in ``above``, gone afterwards; what killed processes left of theirs goes, too."""
    with contextlib.ExitStack() as stack:
        with explained(str(above)):
            above.mkdir(parents=True, exist_ok=True)
            with _lock(above):  # so that nobody takes the new folder for a dead one before it is locked itself
                for left in above.glob(_HIDDEN + "*/"):
                    with _lock(left, wait=False) as dead:
                        if dead:
                            shutil.rmtree(left, ignore_errors=True)
                new = tempfile.TemporaryDirectory(prefix=_HIDDEN, dir=above, ignore_cleanup_errors=True)
                folder = Path(stack.enter_context(new))
                stack.enter_context(_lock(folder))
        yield folder
