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
        unseen: how far off the statistic may be through kinds of sample that the data happens not to hold; the least
            half-width of its interval. Resampling cannot know: of 80 right answers it only ever draws right ones.
    """

    value: float
    resamples: np.ndarray
    unseen: float = 0.0

    def __sub__(self, other: Estimate) -> Estimate:
        # Paired: one unseen kind of sample moves the difference once.
        return Estimate(self.value - other.value, self.resamples - other.resamples, max(self.unseen, other.unseen))

    def __truediv__(self, other: Estimate) -> Estimate:
        """The ratio, undefined wherever ``other`` is not above zero: a share of nothing, or of a negative gap, says nothing."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(other.resamples > 0, self.resamples / other.resamples, np.nan)
        if other.value <= 0:
            return Estimate(math.nan, ratio)
        return Estimate(self.value / other.value, ratio, max(self.unseen, other.unseen) / other.value)

    def interval(self) -> Interval:
        """Percentile interval, at least ``unseen`` to either side. An undefined resample counts as the worst at either end.

        So once more than one in forty is undefined, the interval has no end on that side, as in Fieller's theorem, and no
        gate is passed by luck.
        """
        tail, undefined = (1 - LEVEL) / 2, np.isnan(self.resamples)
        low = np.quantile(np.where(undefined, -np.inf, self.resamples), tail, method="lower")
        high = np.quantile(np.where(undefined, np.inf, self.resamples), 1 - tail, method="higher")
        if math.isnan(self.value):
            return Interval(self.value, float(low), float(high))
        return Interval(self.value, min(float(low), self.value - self.unseen), max(float(high), self.value + self.unseen))


def exact_end(num_samples: int) -> float:
    """The largest rate at which something may happen that did not happen in N samples: 1 - 0.025^(1/N).

    The end of the exact binomial interval of 0 in N (C. Clopper and E. Pearson, Biometrika 26, 1934); about 3.7 / N.
    """
    return 1 - ((1 - LEVEL) / 2) ** (1 / num_samples)


def mean(estimates: Iterable[Estimate]) -> Estimate:
    """Unweighted mean: a branch's score from those of its tasks."""
    parts = list(estimates)
    value, unseen = (float(np.mean([getattr(part, name) for part in parts])) for name in ("value", "unseen"))
    return Estimate(value, np.mean([part.resamples for part in parts], axis=0), unseen)


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
    unseen = exact_end(num_samples) * max(1.0, float(np.abs(table_MN).max()))  # a sample's score moves by 1, or by its scale
    return {name: Estimate(float(values_M[m]), resampled_MB[m], unseen) for m, name in enumerate(scores)}
