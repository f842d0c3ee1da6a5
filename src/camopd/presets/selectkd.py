"""SelecTKD (arXiv:2510.24021) inside `mopd`: the teacher verifies what the student proposes.

A token is accepted with the probability of speculative decoding, s = min(1, pi_T / pi_theta), and a rejected one counts 0.01.
Taken in expectation, A_t = (s + 0.01 (1 - s)) (log pi_T - log pi_theta), so no random number enters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from camopd.presets import Preset, Tokens, log_ratio

if TYPE_CHECKING:
    from torch import Tensor

REJECTED = 0.01


def accepted(tokens: Tokens) -> Tensor:
    """The log-ratio times the expected weight of the token."""
    ratio = log_ratio(tokens)
    acceptance = ratio.exp().clamp_max(1)
    return (acceptance + REJECTED * (1 - acceptance)) * ratio


PRESET = Preset(steps={"recover": 1, "retain": 1}, mixing="mixed", rule=accepted)
