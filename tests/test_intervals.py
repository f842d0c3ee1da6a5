"""The paired bootstrap against hand-worked values, plain loops and a simulation."""

import hashlib
import math

import numpy as np
import pytest

from camopd.evaluation.intervals import Estimate, Interval, bootstrap, exact_end, mean


def estimates(scores, *, num_resamples=500, seed=0, task="t"):
    return bootstrap(
        {name: np.array(values) for name, values in scores.items()}, num_resamples=num_resamples, seed=seed, task=task
    )


def test_values_are_plain_means():
    found = estimates({"a": [1, 0, 0, 1], "b": [0.25, 0.5, 0, 0]})
    assert found["a"].value == 0.5
    assert found["b"].value == 0.1875


def test_resamples_equal_a_plain_loop_over_the_same_draws_across_blocks():
    rng = np.random.default_rng(1)
    scores = {"a": rng.random(3000), "b": rng.random(3000)}  # 3000 samples: a block holds 349 of the 800 resamples
    found = bootstrap(scores, num_resamples=800, seed=7, task="t")
    draws = np.random.default_rng(int.from_bytes(hashlib.sha256(b"7/t").digest()[:16]))
    for resample in range(800):
        chosen = [int(i) for i in draws.integers(3000, size=3000)]
        if resample in (0, 348, 349, 799):
            for name, values in scores.items():
                assert found[name].resamples[resample] == pytest.approx(sum(values[i] for i in chosen) / 3000, abs=1e-12)


def test_models_share_the_draws():
    found = estimates({"a": [1, 0, 0, 1, 1], "same": [1, 0, 0, 1, 1], "opposite": [0, 1, 1, 0, 0]})
    assert not (found["a"] - found["same"]).resamples.any()
    np.testing.assert_allclose(found["a"].resamples + found["opposite"].resamples, 1.0)
    assert found["a"].resamples.std() > 0


def test_what_no_sample_shows_is_not_excluded():
    """80 of 80: resampling sees no doubt; the exact binomial interval ends at 0.955 (0.025 ** (1 / 80))."""
    assert exact_end(80) == pytest.approx(1 - 0.95493, abs=1e-5)
    found = estimates({"before": [1] * 80, "after": [1] * 80})
    assert found["after"].interval().low == pytest.approx(0.95493, abs=1e-5)
    assert (found["after"] / found["before"]).interval().low == pytest.approx(0.95493, abs=1e-5)
    halves = mean([found["after"], estimates({"after": [1] * 20})["after"]])
    assert halves.interval().low == pytest.approx(1 - (exact_end(80) + exact_end(20)) / 2)


def test_a_better_model_never_has_a_worse_lower_end():
    lows = [estimates({"after": [1] * right + [0] * (80 - right)})["after"].interval().low for right in range(81)]
    assert lows == sorted(lows)


def test_a_task_does_not_depend_on_the_others_and_the_seed_decides():
    scores = {"a": [1, 0, 0, 1, 1, 0, 1]}
    np.testing.assert_array_equal(estimates(scores)["a"].resamples, estimates(scores)["a"].resamples)
    assert not np.array_equal(estimates(scores)["a"].resamples, estimates(scores, seed=1)["a"].resamples)
    assert not np.array_equal(estimates(scores)["a"].resamples, estimates(scores, task="u")["a"].resamples)


def test_percentile_interval_by_hand():
    # 0.025 * 999 = 24.975 and 0.975 * 999 = 974.025: outwards to the 25th and the 976th of 1 .. 1000.
    resamples = np.random.default_rng(0).permutation(np.arange(1.0, 1001.0))
    assert Estimate(500.0, resamples).interval() == Interval(500.0, 25.0, 976.0)


def test_arithmetic_by_hand():
    start, after, teacher = (Estimate(v, np.array(r)) for v, r in ((0.1, [0.1, 0.2]), (0.7, [0.5, 0.8]), (0.9, [0.9, 1.0])))
    share = (after - start) / (teacher - start)
    assert share.value == pytest.approx(0.75)
    np.testing.assert_allclose(share.resamples, [0.5, 0.75])
    both = mean([start, teacher])
    assert both.value == pytest.approx(0.5)
    np.testing.assert_allclose(both.resamples, [0.5, 0.6])


@pytest.mark.parametrize(("undefined", "bounded"), [(20, True), (30, False)])
def test_an_undefined_ratio_counts_as_the_worst_at_both_ends(undefined, bounded):
    below = Estimate(1.0, np.where(np.arange(1000) < undefined, 0.0, 1.0))
    ratio = (Estimate(0.5, np.full(1000, 0.5)) / below).interval()
    assert ratio == (Interval(0.5, 0.5, 0.5) if bounded else Interval(0.5, -math.inf, math.inf))


def test_a_share_of_nothing_or_of_a_negative_gap_is_undefined():
    for base in (0.0, -0.2):
        share = Estimate(0.5, np.full(100, 0.5)) / Estimate(base, np.full(100, base))
        assert math.isnan(share.value)
        assert share.interval().low == -math.inf
        assert share.interval().to_json() == {"value": None, "low": None, "high": None}


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Recovered share of two tasks with correlated models; the truth is known: (0.6 - 0.2) / (0.9 - 0.2)."""
    rng, covered, trials = np.random.default_rng(3), 0, 300
    for trial in range(trials):
        tasks = []
        for task in ("a", "b"):
            hardness = rng.random(150)  # one hardness a sample makes the models' answers go together
            scores = {"start": hardness < 0.2, "after": hardness < 0.6, "teacher": (hardness < 0.8) | (rng.random(150) < 0.5)}
            tasks.append(bootstrap(scores, num_resamples=300, seed=trial, task=task))
        start, after, teacher = (mean(task[name] for task in tasks) for name in ("start", "after", "teacher"))
        interval = ((after - start) / (teacher - start)).interval()
        covered += interval.low <= 0.4 / 0.7 <= interval.high
    assert 0.91 <= covered / trials <= 0.985
