"""`alternating` with r_general = 2: the fair control for selection (arXiv:2605.27115, ablation; method section 5)."""

from camopd.presets import Preset

PRESET = Preset(steps={"recover": 3, "retain": 1}, mixing="alternating", scale={"recover": 2.0, "retain": 1.0})
