"""Which branch is active at optimiser step t, and which prompts it gets (method section 3). Pure.

Alternation is counted in optimiser steps: with three steps for general and one for domain a cycle is G, G, G, D.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from camopd.config import Branch


@dataclass(frozen=True)
class Schedule:
    """The position in the repeated cycle; save ``step`` and the rest follows.

    Attributes:
        cycle: branch name of each step in one cycle.
        step: optimiser steps done so far.
    """

    cycle: tuple[str, ...]
    step: int = 0

    @classmethod
    def of(cls, branches: Sequence[Branch], step: int = 0) -> Schedule:
        return cls(tuple(branch.name for branch in branches for _ in range(branch.steps)), step)

    @property
    def active(self) -> str:
        """The branch of the next step."""
        return self.cycle[self.step % len(self.cycle)]

    def advance(self) -> Schedule:
        return replace(self, step=self.step + 1)

    def turns(self) -> int:
        """How many steps the active branch has had before this one: its place in its own prompts."""
        full, rest = divmod(self.step, len(self.cycle))
        return full * self.cycle.count(self.active) + self.cycle[:rest].count(self.active)

    def ahead(self, count: int) -> Iterator[Schedule]:
        """This position and the ``count - 1`` that follow it."""
        at = self
        for _ in range(count):
            yield at
            at = at.advance()


def seed_of(*parts: object) -> int:
    """A 64-bit seed from what it belongs to, never from order or time: ``seed_of(7, "rollout", "g-001", 0)``."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def prompt_slice(*, num_prompts: int, seed: int, branch: str, start: int, count: int) -> list[tuple[int, int]]:
    """The prompts at positions ``start .. start + count - 1`` of a branch's endless, reshuffled pass over its table.

    Each pass (epoch) is a permutation of all rows made from (seed, branch, epoch), so no prompt is skipped and none comes
    twice before all have come once.

    Returns:
        (row in the prompt table, epoch) for each position.
    """
    if num_prompts < 1:
        raise ValueError(f"branch {branch!r} has no prompts")
    picked: list[tuple[int, int]] = []
    for epoch in range(start // num_prompts, (start + count - 1) // num_prompts + 1):
        order = np.random.default_rng(seed_of(seed, "prompts", branch, epoch)).permutation(num_prompts)
        first, last = max(start - epoch * num_prompts, 0), min(start + count - epoch * num_prompts, num_prompts)
        picked += [(int(row), epoch) for row in order[first:last]]
    return picked
