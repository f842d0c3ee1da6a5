"""What a kind of store must offer, and what it is told of those who write a prefix together."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from camopd.store.manifest import FileInfo
from camopd.store.sweeper import Sweeper


class Backend(Protocol):
    """What a kind of store must offer. URIs are normalised by ``check_uri`` before they come here.

    Whatever goes wrong is a StoreError whose sentence names the URI and what to do.
    """

    def stat(self, uri: str) -> FileInfo | None:
        """The file of exactly this URI, or None."""

    def list(self, uri: str) -> Sequence[FileInfo]:
        """The content below the prefix, sorted by name: no hidden names, not its own manifest, nothing of ``domain-ab/``."""

    def read(self, uri: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file from ``start`` on, fewer than ``length`` at its end. Raises MissingError."""

    def write(self, uri: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write a small file in one piece; False when it was there and ``if_absent`` was asked for."""

    def download(self, targets: Mapping[str, Path], stop: threading.Event | None = None) -> Generator[str]:
        """Get files of any size to local paths; names each URI when it is there, in their order, while the others go on.

        Once ``stop`` is set it ends soon, by an error.
        """

    def take(self, source: str, target: str, path: Path) -> bool:
        """Bring a file of this store to a prefix that is being made from a folder.

        True: it lies at ``target``, and its bytes did not come here. False: it lies at ``path`` in the folder, to be published.
        """

    def sending(self, folder: Path, uri: str) -> AbstractContextManager[Sending]:
        """Bring files of a folder to the prefix while others are still written. An error or an interruption leaves nothing."""

    def publish(self, folder: Path, uri: str, shared: Sequence[Path] = ()) -> bool:
        """Make the prefix from all files of a folder, which were sent before, its manifest last; they may be moved.

        What is fetched of it afterwards holds these files alone, whatever killed attempts have left there.

        ``shared`` are the folders of the other writers, where there are several. False: it was finished already, with the same
        content.
        """

    def remove(self, uri: str) -> bool:
        """Delete a file, or a prefix with all that lies below it, its manifest first. False where that is not allowed."""

    def sweeper(self) -> Sweeper:
        """What sees and removes single files, for `camopd gc`."""


class Sending(Protocol):
    """Files on their way to a prefix."""

    def add(self, path: Path) -> None:
        """Send a file that will not change any more; one that was added before is not sent twice."""

    def wait(self) -> bool:
        """Until all are there. False: nothing was sent, because the prefix was finished already."""


class Writers(Protocol):
    """The processes that write one prefix together, as one of them sees it; ``camopd.group.Group`` is one."""

    @property
    def rank(self) -> int:
        """Number of this process; 0 writes the manifest."""

    def gather(self, value: Any) -> Sequence[Any]:
        """JSON of each process, by rank, on each of them; waits for all."""


class Alone:
    """The only writer."""

    rank = 0

    def gather(self, value: Any) -> Sequence[Any]:
        return [value]
