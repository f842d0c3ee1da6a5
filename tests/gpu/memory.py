"""What a piece of work holds: as the GPU's allocator counts, or by the tensors that are alive on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from cost import LiveStorage


def peak_bytes(work: Callable[[], object], inputs: Sequence[Tensor]) -> int:
    """Most bytes alive at once during the work, without its inputs."""
    where = inputs[0].device
    if where.type == "cuda":
        before = torch.cuda.memory_allocated(where)
        torch.cuda.reset_peak_memory_stats(where)
        work()
        return torch.cuda.max_memory_allocated(where) - before
    with LiveStorage(inputs) as live:
        work()
    return live.peak
