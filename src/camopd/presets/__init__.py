"""The methods that a recipe can name, as data over one loop (method section 5). One file a preset; its docstring is its paper.

A preset fills in what a recipe leaves out, and gives the rule that turns each log-ratio into an advantage. Every file here
that defines ``PRESET`` is found by its name (``mopd_3to1.py`` is ``mopd-3to1``), so adding one takes nothing else.
Imports nothing heavy: a recipe is read without torch.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["recover", "retain"]


@dataclass(frozen=True)
class Tokens:
    """Candidate tokens at T positions: the sampled one (C = 1), the top k with the rest as one bucket, or the vocabulary.

    Attributes:
        student_TC: log pi_theta, nats, no gradient.
        teacher_TC: log pi_T, nats.
    """

    student_TC: Tensor
    teacher_TC: Tensor


TokenRule = Callable[[Tokens], "Tensor"]  # advantage A (T, C), nats, of each candidate


def log_ratio(tokens: Tokens) -> Tensor:
    """A = log pi_T - log pi_theta: descends reverse KL (method section 2)."""
    return tokens.teacher_TC - tokens.student_TC


def _for_all(value: float) -> Mapping[Role, float]:
    return {"recover": value, "retain": value}


@dataclass(frozen=True)
class Preset:
    """What distinguishes a method from the others.

    Attributes:
        steps: optimiser steps of a branch in one cycle, or its part of every batch where branches are mixed; 0 leaves it out.
        mixing: one branch a step in turns, or every branch in every step.
        scale: factor r_b on the advantage.
        mass: share rho of the gap mass that selection keeps; 1 is no selection.
        sampler: who answers the prompts.
        rule: advantage of each candidate token.
        signals: the teacher signals that its rule is defined for.
    """

    steps: Mapping[Role, int]
    mixing: Literal["alternating", "mixed"]
    scale: Mapping[Role, float] = field(default_factory=lambda: _for_all(1.0))
    mass: Mapping[Role, float] = field(default_factory=lambda: _for_all(1.0))
    sampler: Literal["student", "teacher"] = "student"
    rule: TokenRule = log_ratio
    signals: tuple[str, ...] = ("sampled", "topk", "full")


@functools.cache
def presets() -> Mapping[str, Preset]:
    """Every preset by name."""
    modules = {module.name: importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)}
    return {name.replace("_", "-"): module.PRESET for name, module in sorted(modules.items())}
