"""What the benchmarks' pages share: Markdown tables, and the machine and versions behind the figures."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def machine(*packages: str, note: str = "") -> str:
    """``x86_64, 2 cores, one thread, Python 3.11.7, torch 2.13.0+cpu``: torch, transformers and the named packages."""
    versions = (f"{name} {version(name)}" for name in ("torch", "transformers", *packages))
    parts = [platform.machine(), f"{os.cpu_count()} cores", note, f"Python {platform.python_version()}", *versions]
    return ", ".join(part for part in parts if part)
