"""Seconds and peak memory of a piece of work on a GPU, as its allocator counts, or on the CPU, by the resident set."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def held(where: torch.device) -> int:
    """Bytes of tensors on a GPU; resident bytes on a CPU, once what is free has gone back to the system (Linux, glibc)."""
    gc.collect()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        return torch.cuda.memory_allocated(where)
    from cost import resident

    return resident()


def measured(work: Callable[[], Any], where: torch.device) -> tuple[float, int]:
    """Seconds by the clock, and the most bytes held meanwhile."""
    held(where)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now (man 5 proc)
    begun = time.perf_counter()
    work()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        return time.perf_counter() - begun, torch.cuda.max_memory_allocated(where)
    from cost import memory

    return time.perf_counter() - begun, memory("VmHWM")


def free_bytes(where: torch.device) -> float:
    """What may still be taken of a GPU's memory, its allocator's own reserve included; of a CPU's, what is available."""
    if where.type == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(where)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return float(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024)
