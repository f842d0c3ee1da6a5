"""Off-policy distillation: the student is fine-tuned on both teachers' own responses, mixed (baseline of arXiv:2605.27115).

L = - mean over sequences of (1/L) sum_t log pi_theta(y_t), y sampled from the branch's teacher: every advantage is 1, and no
importance weight, for nothing is sampled from the student.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from camopd.presets import Preset, Tokens

if TYPE_CHECKING:
    from torch import Tensor


def imitate(tokens: Tokens) -> Tensor:
    """A = 1 for the teacher's own token."""
    return tokens.student_TC.new_ones(()).expand_as(tokens.student_TC)


PRESET = Preset(steps={"recover": 1, "retain": 1}, mixing="mixed", sampler="teacher", rule=imitate, signals=("sampled",))
