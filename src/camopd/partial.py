"""What is kept of a round's updates before the round is done, so that a killed attempt need not start it again.

A checkpoint in the middle of a round is like one at its end. It is copied to the CPU's memory between two updates and written,
hashed and uploaded by a thread while the next updates run. One is in the making at a time, and one is kept; when the round has
its checkpoint, none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from camopd.config import Recipe
from camopd.group import Group
from camopd.store import Store, digest, join


def partial_uri(round_uri: str) -> str:
    return join(round_uri, "train-partial")


class Partial:
    """The checkpoints in the middle of one round. Made by other inputs or settings, they lie elsewhere and are not found.

    Args:
        round_uri: the round.
        config: settings that shape its updates.
        inputs: content id of each input.
        store: where to read and write.
        group: this process among those that share the updates.
    """

    def __init__(
        self, round_uri: str, *, config: Mapping[str, Any], inputs: Mapping[str, str], store: Store, group: Group
    ) -> None:
        self._above, self._config, self._inputs, self._store = partial_uri(round_uri), config, inputs, store
        self._uri = join(self._above, digest([config, inputs]).removeprefix("sha256:")[:12])
        self._group, self._writers = group, group.apart()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._kept, self._blocked, self._saves = "", 0.0, 0

    def wanted(self, done: int, recipe: Recipe) -> bool:
        """Whether a checkpoint is due when so many of the round's updates are done; the last one has the round's own."""
        every = recipe.train.checkpoint_every
        return every > 0 and done % every == 0 and done < recipe.steps_per_round

    def last(self) -> str | None:
        """The checkpoint to go on from, or None: the same on all processes."""
        found = None
        if self._group.rank == 0:
            steps = {file.name.partition("/")[0] for file in self._store.list(self._uri)}
            made = (join(self._uri, step) for step in sorted(steps, reverse=True))
            found = next((uri for uri in made if self._store.manifest(uri) is not None), None)
        self._kept = self._group.gather(found)[0] or ""
        return self._kept or None

    def save(self, done: int, freeze: Callable[[], Callable[[Path, Group], None]]) -> None:
        """Keep the trainer as it is after so many of the round's updates, while the next ones run.

        Args:
            done: updates of the round.
            freeze: takes a copy, and returns what writes it.

        Raises:
            Exception: what the save before this one met.
        """
        begun = time.monotonic()
        self.wait()
        write = freeze()
        self._thread = threading.Thread(target=self._write, args=(join(self._uri, f"{done:04d}"), write), daemon=True)
        self._thread.start()
        self._blocked += time.monotonic() - begun
        self._saves += 1

    def _write(self, uri: str, write: Callable[[Path, Group], None]) -> None:
        def fill(folder: Path) -> Mapping[str, Any]:
            write(folder, self._writers)
            return {}

        try:
            self._store.produce(
                uri,
                stage="train",
                config=self._config,
                inputs=self._inputs,
                write=fill,
                writers=self._writers,
                keep=False,
            )
            before, self._kept = self._kept, uri
            if before and self._group.rank == 0:
                self._store.remove(before)
        except Exception as error:  # for the thread that trains, which raises it
            self._error = error

    def wait(self) -> None:
        """Until nothing is in the making. Raises what the last save met."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error

    def numbers(self) -> dict[str, float]:
        """Seconds for which saving held up the updates, where there was any."""
        return {"checkpoint_seconds": self._blocked} if self._saves else {}


def forget_partial(round_uri: str, store: Store) -> None:
    """Remove what there is of a round's, made from whatever inputs: the round is done."""
    if store.list(partial_uri(round_uri)):
        store.remove(partial_uri(round_uri))
