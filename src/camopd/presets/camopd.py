"""CaMOPD (arXiv:2605.27115): alternation, scaled advantages and gap-based selection (method sections 2 to 4).

L_b = - mean over selected sequences of (1/L) sum_t w_t r_b A_t log pi_theta(y_t), one branch b a step in the order G, G, G, D,
r_general = 2, selection of 80 % of the gap mass on either branch.
"""

from camopd.presets import Preset

PRESET = Preset(
    steps={"recover": 3, "retain": 1},
    mixing="alternating",
    scale={"recover": 2.0, "retain": 1.0},
    mass={"recover": 0.8, "retain": 0.8},
)
