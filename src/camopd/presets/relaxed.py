"""Relaxed on-policy distillation (REOPOLD, arXiv:2603.11137) inside `mopd`: advantages have a floor.

A_t = max(log pi_T - log pi_theta, FLOOR), so that one token which the teacher rules out cannot dominate an update. The floor is
the limit of (1 / (1 - l)) log(l + (1 - l) pi_T / pi_theta) for pi_T = 0, with l = 0.1: -2.56 nats. That paper's two phases of
token selection are not part of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from camopd.presets import Preset, Tokens, log_ratio

if TYPE_CHECKING:
    from torch import Tensor

SHARE = 0.1
FLOOR = math.log(SHARE) / (1 - SHARE)


def floored(tokens: Tokens) -> Tensor:
    """The log-ratio, but at least ``FLOOR``."""
    return log_ratio(tokens).clamp_min(FLOOR)


PRESET = Preset(steps={"recover": 1, "retain": 1}, mixing="mixed", rule=floored)
