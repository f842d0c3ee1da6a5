"""Downloads that begin before they are asked for, while something else is computed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path


class Prefetcher:
    """Gets one URI after another in a thread of its own, in the order in which they were named: the first is wanted first.

    Args:
        get: fetches a URI and raises soon when the event is set.
    """

    def __init__(self, get: Callable[[str, threading.Event], Path]) -> None:
        self._get = get
        self._lock = threading.Lock()
        self._coming: dict[str, Future[Path]] = {}
        self._queue: deque[str] = deque()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def begin(self, uri: str) -> None:
        """Get the URI when those before it are there; nothing new where it is on its way."""
        with self._lock:
            if uri in self._coming:
                return
            self._coming[uri] = Future()
            self._queue.append(uri)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, args=(self._stopped,), name="prefetch", daemon=True)
                self._thread.start()

    def take(self, uri: str) -> Future[Path] | None:
        """What becomes of the URI, whose failure is the caller's; None where nothing of it is done yet."""
        with self._lock:
            future = self._coming.pop(uri, None)
            return None if future is None or future.cancel() else future

    def stop(self) -> None:
        """End what is under way, and forget the rest."""
        with self._lock:
            self._stopped.set()
            self._stopped = threading.Event()
            self._queue.clear()
            self._coming.clear()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(timeout=10)  # seconds: a server that does not answer holds nobody up

    def _work(self, stopped: threading.Event) -> None:
        while True:
            with self._lock:
                if stopped.is_set() or not self._queue:
                    self._thread = None if self._stopped is stopped else self._thread
                    return
                uri = self._queue.popleft()
                future = self._coming.get(uri)
                if future is None or not future.set_running_or_notify_cancel():
                    continue  # taken before its turn
            try:
                future.set_result(self._get(uri, stopped))
            except BaseException as error:  # it is raised where the URI is fetched
                future.set_exception(error)
