"""The gate: is the recovered model good enough to be promoted? Pure.

Both sides are judged by the lower end of the 95 % interval, so that a lucky evaluation set passes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camopd.config import Gate
    from camopd.evaluation.intervals import Interval


@dataclass(frozen=True)
class Decision:
    """What the gate said, and one sentence a branch that says why, for yes and for no."""

    passed: bool
    reasons: tuple[str, ...]


def decide(recovered: Mapping[str, Interval], retained: Mapping[str, Interval], gate: Gate) -> Decision:
    """Yes when every recovered and every retained share is at least its threshold by the interval's lower end.

    Args:
        recovered: branch -> (after - before) / (teacher - before), for the branches to recover (method section 7).
        retained: branch -> after / teacher, for the branches to retain.
        gate: the thresholds.
    """
    verdicts = [
        *(_judge(branch, "recovered", share, gate.min_recovered) for branch, share in recovered.items()),
        *(_judge(branch, "retained", share, gate.min_retained) for branch, share in retained.items()),
    ]
    return Decision(bool(recovered) and all(passed for passed, _ in verdicts), tuple(reason for _, reason in verdicts))


def _judge(branch: str, kind: str, share: Interval, threshold: float) -> tuple[bool, str]:
    """Yes or no for one branch, with the sentence that names the number, its interval and the threshold."""
    needed = f"the gate needs {threshold:.3f}"
    base = "the teacher's lead over the start" if kind == "recovered" else "the teacher's score"
    if math.isnan(share.value):
        return False, f"{branch}: no, {kind} share is undefined, for {base} is not above zero; {needed}"
    number = f"{kind} share {share.value:.3f}, 95 % interval {share.low:.3f} to {share.high:.3f}"
    if math.isnan(share.low) or share.low == -math.inf:
        return False, f"{branch}: no, {number}: {base} is too close to zero to bound it; {needed}"
    passed = share.low >= threshold
    return passed, f"{branch}: {'yes' if passed else 'no'}, {number}; {needed} at the lower end"
