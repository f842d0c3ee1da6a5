"""benchmarks/study.py: its budgets, its statistics, and what its page concludes from them."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # a script: its folder is where its parts are found

import study_report
from study import FULL, MOST, Job, all_variants, identity, recipe_of, with_budget
from study_ideas import EXTRA_PRESETS, IDEAS, extra_presets
from study_numbers import Interval, Run, Size, Study, Variant, t_interval

from camopd.presets import presets
from camopd.store import Store

SIZE = Size(num_rounds=4, steps_per_round=16, prompts_per_step=64)
START = {"micro_seen": 0.2, "micro_unseen": 0.0, "micro_domain": 0.8}
TEACHER = {"micro_seen": 1.0, "micro_unseen": 1.0, "micro_domain": 0.0}


def made(variant: str, seed: int, *, tokens: list[int] | None = None, general: float = 0.5, domain: float = 0.8) -> Run:
    """A run that scores the same at each round."""
    tokens = tokens or [100, 200, 300, 400]
    scores = {"micro_seen": general, "micro_unseen": general, "micro_domain": domain}
    return Run(
        variant,
        seed,
        "id",
        tuple(tokens),
        tuple(map(float, tokens)),
        (8,) * len(tokens),
        dict.fromkeys(range(1, len(tokens) + 1), scores),
    )


def study_of(*runs: Run, seeds: tuple[int, ...] = (1, 2, 3)) -> Study:
    keys = dict.fromkeys(run.variant for run in runs)
    bases = {key: "topk/alternating" if key.startswith("options") else "" for key in keys}
    variants = [Variant(*key.split("/"), parameters={}, base=bases[key]) for key in keys]
    return Study(runs, variants, SIZE, seeds, start=START, teacher=TEACHER)


# --- Variants -----------------------------------------------------------------------------------------------------------


def test_every_variant_is_a_valid_recipe_of_its_own():
    store = Store()
    with extra_presets():
        ids = {v.key: identity(recipe_of(v, 1, FULL, "."), v.idea, store) for v in all_variants()}
    assert len(set(ids.values())) == len(ids)
    assert {name for name in presets() if f"topk/{name}" not in ids} == {"off-policy-kd"}  # it has no other signal
    assert not EXTRA_PRESETS.keys() & presets().keys()  # they are the study's own


def test_every_variant_rolls_out_the_same_number():
    with extra_presets():
        for variant in all_variants():
            recipe = recipe_of(variant, 1, FULL, ".")
            responses = recipe.num_rounds * recipe.steps_per_round * recipe.rollout.prompts_per_step
            responses *= recipe.rollout.samples_per_prompt
            assert responses == FULL.rollouts * {"options": 1, "longer": 2}.get(variant.group, MOST), variant.name


def test_every_option_has_a_baseline_and_an_idea_that_exist():
    variants = all_variants()
    keys = {variant.key for variant in variants}
    options = [variant for variant in variants if variant.base]
    assert {option.base for option in options} <= keys
    assert {option.idea for option in options} == IDEAS.keys()


# --- Budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "budget", "expected"),
    [
        ([100, 200, 300, 400], None, 4),  # equal rollouts
        ([100, 200, 300], None, None),  # stopped before
        ([30, 60, 90, 120, 150, 180], None, 4),  # goes on, but is measured there
        ([30, 60, 90, 120, 150, 180], 160, 5),  # the nearest round, not the next
        ([30, 60, 90, 120, 150, 180], 170, 6),
        ([110, 220, 330, 440], 400, 4),
        ([140, 280, 420, 560], 400, 3),  # more tokens an update: fewer updates
        ([30, 60, 90, 120], 400, None),  # never got there
        ([], 400, None),
    ],
)
def test_round_at(tokens, budget, expected):
    assert Run("topk/x", 1, "id", tuple(tokens), (), (), {}).round_at(SIZE, budget) == expected


def test_measures_half_all_and_the_token_budget():
    run = Run("topk/x", 1, "id", (30, 60, 90, 120, 150, 180), (), (), {})
    assert run.rounds_to_measure(SIZE, 160) == [2, 4, 5]
    assert run.rounds_to_measure(SIZE, None) == [2, 4]
    assert Run("topk/x", 1, "id", (30, 60, 90), (), (), {}, "round 4: why").rounds_to_measure(SIZE, None) == [2]


def test_the_token_budget_is_the_yardsticks_with_the_same_signal_and_seed():
    results = [
        made("topk/alternating", 1, tokens=[1, 2, 3, 4, 5]),
        made("topk/alternating", 2, tokens=[10, 20, 30, 40]),
        made("sampled/alternating", 2, tokens=[5, 6, 7, 8]),
    ]

    def budget(group: str, seed: int) -> int | None:
        return with_budget(Job(Variant(group, "camopd", {}), seed, SIZE, "id"), results).budget

    assert [budget("topk", 1), budget("topk", 2), budget("sampled", 2)] == [4, 40, 8]
    assert budget("sampled", 1) is None
    assert budget("options", 1) is None
    study = study_of(*results, made("topk/camopd", 2))
    assert study.token_budget("topk/camopd", 2) == 40


@given(text=st.text(), score=st.floats(0, 1), seconds=st.floats(0, 1e6))
def test_a_run_survives_its_line(text, score, seconds):
    run = Run("topk/camopd", 3, "id", (1, 2), (0.5, seconds), (0, 1), {5: {text: score}}, stopped=text)
    line = run.to_json()
    assert "\n" not in line
    assert Run.from_json(line) == run


# --- Statistics ---------------------------------------------------------------------------------------------------------


def test_t_interval_of_three_values():
    found = t_interval([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.3027 by any table
    assert (found.mean, found.above, found.below) == (2.0, 3, 0)
    assert found.high - found.mean == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert found.mean - found.low == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert found.sign == 0


def test_t_interval_without_spread_or_with_too_few_values():
    assert t_interval([0.0, 0.0]) == Interval(0.0, 0.0, 0.0, 0, 0)
    assert t_interval([0.1, 0.1]).sign == 1
    assert t_interval([-0.1, -0.1]).sign == -1
    assert math.isnan(t_interval([0.5]).low)
    assert t_interval([0.5]).sign == 0
    assert str(t_interval([])) == "n/a"


def test_shares_by_hand():
    measure = study_of(made("topk/x", 1, general=0.55, domain=0.6)).measures("topk/x", "rollouts")[1]
    assert measure.recovered == pytest.approx((0.55 - 0.1) / (1.0 - 0.1))
    assert measure.retained == pytest.approx(0.6 / 0.8)
    assert (measure.updates, measure.tokens, measure.clipped) == (64, 400, 8 / 64)


def test_differences_are_paired_by_the_seeds_that_both_have():
    study = study_of(
        *(made("topk/a", seed, general=g) for seed, g in ((1, 0.6), (2, 0.8), (3, 0.7))),
        *(made("topk/b", seed, general=g) for seed, g in ((1, 0.5), (2, 0.6))),
        made("topk/b", 3, tokens=[100, 200]),
    )
    difference = study.paired("topk/a", "topk/b")
    assert difference.mean == pytest.approx(statistics.mean([0.1, 0.2]) / 0.9)
    assert (difference.above, difference.below) == (2, 0)


def test_equal_tokens_are_measured_at_another_round_than_equal_rollouts():
    run = Run("topk/camopd", 1, "id", (100, 200, 300, 380, 490), (1.0,) * 5, (0,) * 5, {})
    scores = {number: {**START, "micro_unseen": number / 10} for number in range(1, 6)}
    camopd = Run(**{**vars(run), "scores": scores})
    study = study_of(made("topk/alternating", 1, tokens=[120, 240, 360, 480]), camopd)
    assert study.measures("topk/camopd", "rollouts")[1].unseen == 0.4
    assert study.measures("topk/camopd", "tokens")[1].unseen == 0.5


# --- What the page concludes ----------------------------------------------------------------------------------------------


def example() -> Study:
    """mopd below alternating by far, camopd like alternating, general-only best but without the domain; one stopped run."""
    general = {"mopd": 0.4, "alternating": 0.6, "camopd": 0.6, "general-only": 0.9}
    noise = {1: 0.0, 2: 0.004, 3: -0.004}
    runs = [
        made(f"{group}/{name}", seed, general=value + noise[seed] * (name == "camopd"), domain=0.1 if value > 0.8 else 0.8)
        for group in ("sampled", "topk")
        for name, value in general.items()
        for seed in noise
    ]
    stopped = Run("options/all prompts", 1, "id", (100,), (1.0,), (0,), {}, "round 2: too many answers are empty")
    return study_of(*runs, stopped)


def test_the_page_follows_the_numbers():
    text = study_report.page(example())
    assert 'Recommended: `method = "alternating"`' in text  # general-only has lost the domain
    assert "`general-only` (topk) 0.125" in text.split("with a mean retained share under")[1]
    (rivals,) = [line.split("not told apart from it: ")[1] for line in text.splitlines() if "**Recommended" in line]
    assert "`camopd` (sampled)" in rivals
    assert "`mopd`" not in rivals
    (claim,) = [line for line in text.splitlines() if line.startswith("| camopd over mopd")]
    assert claim.count("agrees: **+0.222") == 4
    assert "seed 1: round 2: too many answers are empty" in text
    assert "nan" not in text


def test_options_are_compared_with_what_they_change():
    runs = [
        made(variant, seed, general=general, domain=domain)
        for variant, general, domain in (
            ("topk/alternating", 0.5, 0.8),
            ("options/worse", 0.4, 0.8),
            ("options/better", 0.95, 0.6),
        )
        for seed in (1, 2, 3)
    ]
    text = study_report.page(study_of(*runs)).split("### Options of `alternating` (topk)")[1]
    assert "Recovered share: above: `better` +0.500; below: `worse` -0.111; not told apart: none." in text
    assert "Domain: above: none; below: `better` -0.200; not told apart: `worse`." in text
    assert text.index("| better |") < text.index("| worse |")


def test_the_opposite_of_a_claim_is_said():
    runs = [made(f"topk/{name}", s, general=g) for name, g in (("mopd", 0.6), ("camopd", 0.4)) for s in (1, 2, 3)]
    assert "the opposite 1 (camopd over mopd)" in study_report.page(study_of(*runs))


def test_an_undecided_claim_is_not_called_equal():
    runs = [
        made(f"topk/{name}", s, general=g + d * s)
        for name, g, d in (("mopd", 0.5, 0.0), ("camopd", 0.4, 0.05))
        for s in (1, 2, 3)
    ]
    assert "not decided 1 (camopd over mopd)" in study_report.page(study_of(*runs))
