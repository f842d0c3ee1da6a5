"""The gate decides by the lower end of the interval and always says why."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from camopd.config import Gate
from camopd.evaluation.intervals import Interval
from camopd.gate import decide

GATE = Gate(min_recovered=0.6, min_retained=0.95)
GOOD = {"recovered": {"general": Interval(0.72, 0.64, 0.79)}, "retained": {"domain": Interval(0.99, 0.97, 1.01)}}


def test_yes_names_number_interval_and_threshold():
    decision = decide(**GOOD, gate=GATE)
    assert decision.passed
    assert decision.reasons == (
        "general: yes, recovered share 0.720, 95 % interval 0.640 to 0.790; the gate needs 0.600 at the lower end",
        "domain: yes, retained share 0.990, 95 % interval 0.970 to 1.010; the gate needs 0.950 at the lower end",
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"recovered": {"general": Interval(0.72, 0.59, 0.79)}},
            "general: no, recovered share 0.720, 95 % interval 0.590 to 0.790; the gate needs 0.600 at the lower end",
        ),
        (
            {"retained": {"domain": Interval(0.96, 0.94, 0.98)}},
            "domain: no, retained share 0.960, 95 % interval 0.940 to 0.980; the gate needs 0.950 at the lower end",
        ),
        (
            {"recovered": {"general": Interval(math.nan, -math.inf, math.inf)}},
            "general: no, recovered share is undefined, for the teacher's lead over the start is not above zero; "
            "the gate needs 0.600",
        ),
        (
            {"retained": {"domain": Interval(math.nan, -math.inf, math.inf)}},
            "domain: no, retained share is undefined, for the teacher's score is not above zero; the gate needs 0.950",
        ),
        (
            {"recovered": {"general": Interval(0.9, -math.inf, math.inf)}},
            "general: no, recovered share 0.900, 95 % interval -inf to inf: the teacher's lead over the start is too close to "
            "zero to bound it; the gate needs 0.600",
        ),
        (
            {"retained": {"domain": Interval(0.99, math.nan, math.nan)}},
            "domain: no, retained share 0.990, 95 % interval nan to nan: the teacher's score is too close to zero to bound it; "
            "the gate needs 0.950",
        ),
    ],
)
def test_no_says_why(change, reason):
    decision = decide(**GOOD | change, gate=GATE)
    assert not decision.passed
    assert reason in decision.reasons
    assert len(decision.reasons) == 2


def test_one_of_three_branches_is_enough_for_no():
    retained = {"icd": Interval(1.0, 1.0, 1.0), "drugs": Interval(0.9, 0.85, 0.95)}
    decision = decide(GOOD["recovered"], retained, GATE)
    assert not decision.passed
    assert [reason.split(",")[0] for reason in decision.reasons] == ["general: yes", "icd: yes", "drugs: no"]


def test_nothing_recovered_is_never_a_pass():
    assert not decide({}, GOOD["retained"], GATE).passed


@example(0.5, 0.9, 0.5, 0.9)
@given(st.floats(-1, 2), st.floats(-1, 2), st.floats(0, 1), st.floats(0, 1))
def test_passes_exactly_when_both_lower_ends_reach_their_threshold(recovered, retained, need_recovered, need_retained):
    gate = Gate(min_recovered=need_recovered, min_retained=need_retained)
    decision = decide({"g": Interval(2.0, recovered, 2.0)}, {"d": Interval(2.0, retained, 2.0)}, gate)
    assert decision.passed == (recovered >= need_recovered and retained >= need_retained)
