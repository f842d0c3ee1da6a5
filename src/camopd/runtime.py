"""What must be set before torch works."""

from __future__ import annotations


def set_threads(num_threads: int | None) -> None:
    """Use that many CPU threads; with 1 a run is bit-identical on one machine. None leaves torch's own choice."""
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)
