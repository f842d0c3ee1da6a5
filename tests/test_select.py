"""Gap mass by hand and by its properties (method section 4)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.select import gap_score, select_by_mass, summarise

scores_strategy = st.dictionaries(
    st.tuples(st.text("abc", min_size=1, max_size=3), st.integers(0, 3)), st.floats(0, 100), min_size=1, max_size=30
)


def test_scores_by_hand() -> None:
    teacher, student = [-1.0, -2.0, -0.5], [-2.0, -1.0, -0.5]  # gaps +1, -1, 0
    assert gap_score(teacher, student, "absolute") == pytest.approx(2 / 3)
    assert gap_score(teacher, student, "positive") == pytest.approx(1 / 3)


def test_keeps_the_shortest_prefix_that_reaches_the_mass() -> None:
    scores = {("a", 0): 1.0, ("b", 0): 5.0, ("c", 0): 3.0, ("d", 0): 1.0}  # 5 + 3 = 8 of 10
    choices = select_by_mass(scores, 0.8)
    assert {key for key, choice in choices.items() if choice.kept} == {("b", 0), ("c", 0)}
    assert [choices[key].rank for key in (("b", 0), ("c", 0), ("a", 0), ("d", 0))] == [1, 2, 3, 4]
    assert choices[("c", 0)].cumulative_share == pytest.approx(0.8)
    assert choices[("a", 0)].reason == "below mass"


def test_one_sample_may_hold_all_the_mass() -> None:
    choices = select_by_mass({("a", 0): 9.0, ("b", 0): 0.5, ("c", 0): 0.5}, 0.8)
    assert [choice.kept for choice in choices.values()] == [True, False, False]


def test_no_gap_keeps_everything() -> None:
    """The domain branch before the first update: student and teacher are the same model."""
    assert all(choice.kept for choice in select_by_mass({("a", 0): 0.0, ("b", 0): 0.0}, 0.8).values())


def test_rounding_errors_are_no_gap() -> None:
    """Decoding and scoring differ in the last bits: without a floor such a batch would lose two samples in three by chance."""
    scores = {("a", 0): 9e-7, ("b", 0): 1e-8, ("c", 0): 0.0}
    assert all(choice.kept for choice in select_by_mass(scores, 0.8, floor=1e-3).values())
    assert sum(choice.kept for choice in select_by_mass(scores, 0.8).values()) == 1
    assert sum(choice.kept for choice in select_by_mass({("a", 0): 0.9, ("b", 0): 0.0}, 0.8, floor=1e-3).values()) == 1


def test_ties_break_by_key() -> None:
    choices = select_by_mass({("b", 0): 1.0, ("a", 1): 1.0, ("a", 0): 1.0}, 0.5)
    assert [key for key, choice in choices.items() if choice.kept] == [("a", 0), ("a", 1)]


@given(scores_strategy, st.floats(0.01, 1.0), st.randoms())
def test_order_never_matters_and_the_prefix_is_minimal(scores: dict, mass: float, random) -> None:
    items = list(scores.items())
    random.shuffle(items)
    choices = select_by_mass(dict(items), mass)
    assert choices == select_by_mass(scores, mass)
    kept = [scores[key] for key, choice in choices.items() if choice.kept]
    dropped = [scores[key] for key, choice in choices.items() if not choice.kept]
    total = math.fsum(scores.values())
    assert math.fsum(kept) >= mass * total * (1 - 1e-9)
    if dropped:
        assert min(kept) >= max(dropped)
        assert math.fsum(kept) - min(kept) < mass * total * (1 + 1e-9)


def test_a_mass_of_one_is_no_selection() -> None:
    scores = {("a", 0): 0.1, ("b", 0): 0.2, ("c", 0): 0.3, ("d", 0): 0.0}
    assert all(choice.kept for choice in select_by_mass(scores, 1.0).values())
    dropped = [key for key, choice in select_by_mass(scores, 1 - 1e-15).items() if not choice.kept]
    assert dropped == [("d", 0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_that_cannot_be_ranked_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        select_by_mass({("a", 0): bad, ("b", 0): 1.0}, 0.8)


def test_summary_shows_the_length_bias() -> None:
    rows = [{"kept": True, "score": 3.0, "num_tokens": 10}, {"kept": False, "score": 1.0, "num_tokens": 4}]
    summary = summarise(rows)
    assert (summary["kept_mass"], summary["mean_length_kept"], summary["mean_length_dropped"]) == (0.75, 10, 4)
