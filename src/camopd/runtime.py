"""What must be set before torch works, and what it could work on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from typing import Any


def set_threads(num_threads: int | None, *, num_processes: int = 1) -> None:
    """Use that many CPU threads; with 1 a run is bit-identical on one machine.

    None is torch's own choice, which several processes of one machine divide among them.
    """
    if num_threads is None and num_processes == 1:
        return
    import torch

    torch.set_num_threads(num_threads or max(1, torch.get_num_threads() // num_processes))


MODEL_STAGES = ("rollout", "score", "train", "evaluate")


def accelerators(stage: str) -> dict[str, Any]:
    """``count`` and ``name`` of the accelerators that this process could use while it did a stage; empty without any.

    All that are visible count, used or not: the pod was given them, and nobody else could have them. Nothing here makes CUDA
    start, which no process could fork after.
    """
    if stage not in MODEL_STAGES:  # the others compute nothing on them, and torch takes seconds to import
        return {}
    try:
        import torch
    except ImportError:
        return {}
    count = torch.cuda.device_count()
    return {"count": count, "name": _device_name()} if count else {}


def _device_name() -> str:
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(said.splitlines()), "unknown").strip()


def together(held: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What several processes held: on one machine all see the same accelerators, those of several machines add up.

    Args:
        held: machine and ``accelerators`` of each process.
    """
    machines: dict[str, Mapping[str, Any]] = {}
    for machine, own in held:
        if own.get("count", 0) > machines.get(machine, {}).get("count", 0):
            machines[machine] = own
    names = ", ".join(sorted({own["name"] for own in machines.values()}))
    return {"count": sum(own["count"] for own in machines.values()), "name": names} if machines else {}
