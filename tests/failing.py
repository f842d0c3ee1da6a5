"""What tests let worker processes do: add up a number, and fail in every way. Imports little, since it starts often."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from camopd.errors import InputError, Problem, UnhealthyRunError


def ranks_sum(value: int) -> int:
    """The sum of value + rank over the processes."""
    number = torch.tensor(value + dist.get_rank())
    dist.all_reduce(number)
    return int(number)


def fail(how: str, rank: int, pids: str = "") -> None:
    """One rank fails in its own way while the others wait for it."""
    if pids:
        Path(pids, str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == rank:
        if how == "unhealthy":
            raise UnhealthyRunError("the loss is a pear")
        if how == "input":
            raise InputError([Problem("train.x", "is wrong", "mend it"), Problem("train.y", "is wrong, too")])
        if how == "fault":
            raise KeyError("a secret prompt")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(7)
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))
