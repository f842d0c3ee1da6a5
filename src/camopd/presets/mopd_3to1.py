"""`mopd` on three parts of general prompts and one of domain prompts: the fair control for alternation (method section 5)."""

from camopd.presets import Preset

PRESET = Preset(steps={"recover": 3, "retain": 1}, mixing="mixed")
