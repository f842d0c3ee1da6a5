"""Vanilla multi-teacher on-policy distillation (arXiv:2606.30406; the baseline of arXiv:2605.27115).

L = - mean over all sequences of (1/L) sum_t w_t A_t log pi_theta(y_t), every step half general and half domain.
"""

from camopd.presets import Preset

PRESET = Preset(steps={"recover": 1, "retain": 1}, mixing="mixed")
