"""Decoupled training alone (arXiv:2605.27115, section on decoupling; method section 3): G, G, G, D, no selection, r = 1."""

from camopd.presets import Preset

PRESET = Preset(steps={"recover": 3, "retain": 1}, mixing="alternating")
