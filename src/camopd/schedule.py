"""Which branches are active at optimiser step t, and which prompts they get (method section 3). Pure.

Alternation is counted in optimiser steps: with three steps for general and one for domain a cycle is G, G, G, D. Where
branches are mixed, every step takes prompts of all of them in that proportion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from camopd.config import Branch, Recipe


@dataclass(frozen=True)
class Schedule:
    """The position in the repeated cycle; save ``step`` and the rest follows.

    Attributes:
        cycle: prompts of each active branch, for each step of one cycle.
        step: optimiser steps done so far.
    """

    cycle: tuple[Mapping[str, int], ...]
    step: int = 0

    @classmethod
    def of(cls, recipe: Recipe, step: int = 0) -> Schedule:
        return cls(make_cycle(recipe.branches, recipe.mixing, recipe.rollout.prompts_per_step), step)

    @property
    def active(self) -> Mapping[str, int]:
        """Prompts by branch of the next step."""
        return self.cycle[self.step % len(self.cycle)]

    def advance(self, count: int = 1) -> Schedule:
        return replace(self, step=self.step + count)

    def taken(self, branch: str) -> int:
        """Prompts that a branch has had before this step: its place in its own prompts."""
        full, rest = divmod(self.step, len(self.cycle))
        per_step = [prompts.get(branch, 0) for prompts in self.cycle]
        return full * sum(per_step) + sum(per_step[:rest])

    def ahead(self, count: int) -> Iterator[Schedule]:
        """This position and the ``count - 1`` that follow it."""
        return (self.advance(i) for i in range(count))


def make_cycle(
    branches: Sequence[Branch], mixing: Literal["alternating", "mixed"], prompts_per_step: int
) -> tuple[Mapping[str, int], ...]:
    """Prompts by branch for each step of a cycle.

    In turns ``({"general": 512}, {"general": 512}, {"general": 512}, {"domain": 512})``, mixed ``({"general": 384,
    "domain": 128},)``. A mixed batch is divided by the branches' ``steps``, by rounding the running total down: the parts add
    up, and each is less than one prompt away from its exact share.
    """
    if mixing == "alternating":
        return tuple({branch.name: prompts_per_step} for branch in branches for _ in range(branch.steps))
    edges = np.cumsum([0, *(branch.steps for branch in branches)])
    counts = np.diff(edges * prompts_per_step // edges[-1]).tolist()
    return ({branch.name: count for branch, count in zip(branches, counts, strict=True) if count},)


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


def share_slice(start: int, count: int, share: float) -> tuple[int, int]:
    """The part with that share of a branch's prompts: its first position and number in ``start .. start + count - 1``."""
    first = int(start * share + 1e-9)
    return first, int((start + count) * share + 1e-9) - first
