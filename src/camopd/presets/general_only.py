"""The branches to recover alone, without review: the preservation control that arXiv:2605.27115 lacks (method section 5)."""

from camopd.presets import Preset

PRESET = Preset(steps={"recover": 1, "retain": 0}, mixing="alternating")
