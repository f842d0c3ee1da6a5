"""What must be set before torch works."""

from __future__ import annotations

import os


def set_threads(num_threads: int | None) -> None:
    """Use that many CPU threads; with 1 a run is bit-identical on one machine. None leaves torch's own choice."""
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)


def cores_each(num_processes: int) -> int | None:
    """CPU threads of each of several processes of one machine, that they do not crowd it; None, torch's own choice, for one."""
    return max(1, (os.cpu_count() or 1) // num_processes) if num_processes > 1 else None
