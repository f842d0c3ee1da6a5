"""The processes that share one training: how they meet, and the words that pass between them.

Tensors go through torch's default process group. Words, JSON and never a pickle, go through the key-value store at which the
group met, so that a thread may wait for the others while the main one computes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

from camopd.errors import WorkerError

if TYPE_CHECKING:
    import torch.distributed as dist

TIMEOUT = 900.0  # seconds that a process waits for the others; one pass, or loading a model, must not take longer
_POLL = 0.01  # seconds between two looks; the store's own wait would keep other threads from it


@dataclass(frozen=True)
class Group:
    """This process among those that share a training; without any other, a group of one.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        local_rank: its number on this machine: which GPU is its own.
        on_this_machine: how many there are on this machine.
        timeout: seconds that it waits for the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    on_this_machine: int = 1
    timeout: float = TIMEOUT
    _board: dist.Store | None = None
    _topic: str = "words"
    _numbers: Iterator[int] = field(default_factory=count)

    def gather(self, value: Any) -> list[Any]:
        """Each process's value by rank, on every process; all must call, in the same order. Waits for the last.

        Args:
            value: JSON.

        Raises:
            WorkerError: another process did not come.
        """
        if self._board is None:
            return [value]
        prefix = f"{self._topic}/{next(self._numbers)}"
        self._board.set(f"{prefix}/{self.rank}", json.dumps(value))
        return [json.loads(self._word(f"{prefix}/{rank}", rank)) for rank in range(self.size)]

    def _word(self, key: str, rank: int) -> bytes:
        assert self._board is not None
        until = time.monotonic() + self.timeout
        while not self._board.check([key]):
            if time.monotonic() > until:
                raise WorkerError(
                    f"process {self.rank + 1} of {self.size} waited {self.timeout:.0f} s for process {rank + 1}; see its log"
                )
            time.sleep(_POLL)
        return self._board.get(key)

    def apart(self) -> Group:
        """The same processes with an order of calls of their own, for a thread; all must call, in the same order."""
        return replace(self, _topic=f"{self._topic}/{next(self._numbers)}", _numbers=count())


_current = Group()


def current() -> Group:
    """The group that this process has joined, or the group of one."""
    return _current


def join_group(address: str, *, rank: int = -1, size: int = -1, timeout: float = TIMEOUT) -> Group:
    """Make torch's default process group with the other processes; NCCL where there are GPUs, else gloo.

    Args:
        address: ``file:///path`` with rank and size, or ``env://`` with what torchrun sets.
        rank: number of this process.
        size: how many there are.
        timeout: seconds that a process waits for the others.
    """
    global _current
    import torch
    import torch.distributed as dist

    patience = timedelta(seconds=timeout)
    board, rank, size = next(dist.rendezvous(address, rank, size, timeout=patience))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))  # without torchrun all are on this machine
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend = "nccl"
    dist.init_process_group(backend, store=dist.PrefixStore("torch", board), rank=rank, world_size=size, timeout=patience)
    _current = Group(rank, size, local_rank, on_this_machine, timeout, dist.PrefixStore("camopd", board))
    return _current
