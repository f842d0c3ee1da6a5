"""Scores with 95 % intervals by a bootstrap that is paired by sample. Pure; numpy only.

All models answer the same samples, so one draw of samples serves all of them: what two models share (an easy sample, a
lucky draw) cancels in their difference and in their ratio. Tasks are resampled one by one, because a branch's score is the
mean of its tasks' means. Percentile intervals: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_BLOCK = 1 << 20  # drawn samples alive at once: bounds memory, does not change the result


@dataclass(frozen=True)
class Interval:
    """A number with the ends of its 95 % interval. NaN: undefined; an infinite end: the data cannot bound it."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """``{"value", "low", "high"}``; None stands for what is not finite, which JSON does not know."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


@dataclass(frozen=True)
class Estimate:
    """A statistic and its value on each resample; estimates over the same draws combine sample by sample.

    Attributes:
        value: the statistic on the data; NaN where undefined.
        resamples: [B] the statistic on each of B resamples; NaN where undefined.
    """

    value: float
    resamples: np.ndarray

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.resamples - other.resamples)

    def __truediv__(self, other: Estimate) -> Estimate:
        """The ratio, undefined wherever ``other`` is not above zero: a share of nothing, or of a negative gap, says nothing."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(other.resamples > 0, self.resamples / other.resamples, np.nan)
        return Estimate(self.value / other.value if other.value > 0 else math.nan, ratio)

    def interval(self) -> Interval:
        """Percentile interval. An undefined resample counts as the worst at either end.

        So once more than one in forty is undefined, the interval has no end on that side, as in Fieller's theorem, and no
        gate is passed by luck.
        """
        tail, undefined = (1 - LEVEL) / 2, np.isnan(self.resamples)
        low = np.quantile(np.where(undefined, -np.inf, self.resamples), tail, method="lower")
        high = np.quantile(np.where(undefined, np.inf, self.resamples), 1 - tail, method="higher")
        return Interval(self.value, float(low), float(high))


def mean(estimates: Iterable[Estimate]) -> Estimate:
    """Unweighted mean: a branch's score from those of its tasks."""
    parts = list(estimates)
    return Estimate(float(np.mean([part.value for part in parts])), np.mean([part.resamples for part in parts], axis=0))


def bootstrap(scores: Mapping[str, np.ndarray], *, num_resamples: int, seed: int, task: str) -> dict[str, Estimate]:
    """Mean score of each model on one task, on the task's samples and on resamples that all models share.

    Args:
        scores: model -> [N] scores of the N samples, in one order for all models.
        num_resamples: B.
        seed: with ``task`` the only source of randomness, so that a task's draws do not depend on the other tasks.
        task: the task's name.
    """
    table_MN = np.stack([np.asarray(values, dtype=np.float64) for values in scores.values()])
    num_samples = table_MN.shape[1]
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{task}".encode()).digest()[:16]))
    rows = max(1, _BLOCK // num_samples)
    means = []
    for start in range(0, num_resamples, rows):
        draws_BN = rng.integers(num_samples, size=(min(rows, num_resamples - start), num_samples))
        means.append([model_N[draws_BN].mean(axis=1) for model_N in table_MN])
    resampled_MB = np.concatenate(means, axis=1)
    values_M = table_MN.mean(axis=1)
    return {name: Estimate(float(values_M[m]), resampled_MB[m]) for m, name in enumerate(scores)}
