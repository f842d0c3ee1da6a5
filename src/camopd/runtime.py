"""What must be set before torch works."""

from __future__ import annotations


def set_threads(num_threads: int | None, *, num_processes: int = 1) -> None:
    """Use that many CPU threads; with 1 a run is bit-identical on one machine.

    None is torch's own choice, which several processes of one machine divide among them.
    """
    if num_threads is None and num_processes == 1:
        return
    import torch

    torch.set_num_threads(num_threads or max(1, torch.get_num_threads() // num_processes))
