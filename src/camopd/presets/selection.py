"""`mopd` with gap-based selection on each branch of every batch (arXiv:2605.27115, ablation; method section 4)."""

from camopd.presets import Preset

PRESET = Preset(steps={"recover": 1, "retain": 1}, mixing="mixed", mass={"recover": 0.8, "retain": 0.8})
