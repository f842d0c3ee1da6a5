"""What benchmarks/study.py measures: runs, the two budgets, shares and paired differences. Pure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from scipy import stats

Budget = Literal["rollouts", "tokens"]
YARDSTICK = "alternating"  # the preset whose tokens are the budget


# --- Data -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The equal rollouts of every run."""

    num_rounds: int
    steps_per_round: int
    prompts_per_step: int

    @property
    def rollouts(self) -> int:
        return self.num_rounds * self.steps_per_round * self.prompts_per_step


@dataclass(frozen=True)
class Variant:
    """Something to compare.

    Attributes:
        group: sampled, topk, options or longer (twice the rollouts).
        name: unique in its group.
        parameters: on top of the recipe.
        base: key of the variant that an option changes.
        idea: of study_ideas.IDEAS, where the loop itself is another.
    """

    group: str
    name: str
    parameters: Mapping[str, Any]
    base: str = ""
    idea: str = ""

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        variant: its key.
        seed: of sampling and prompt order.
        run_id: settings, models, prompts and tasks behind it.
        tokens: response tokens trained on up to each round.
        seconds: processor seconds up to each round, evaluation left out.
        clipped: updates up to each round whose gradient was longer than train.max_grad_norm.
        scores: accuracy on each task after some rounds.
        stopped: why the run stopped itself, or nothing.
    """

    variant: str
    seed: int
    run_id: str
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    clipped: tuple[int, ...]
    scores: Mapping[int, Mapping[str, float]]
    stopped: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Run:
        record = json.loads(line)
        scores = {int(number): by_task for number, by_task in record["scores"].items()}
        lists = {name: tuple(record[name]) for name in ("tokens", "seconds", "clipped")}
        return cls(**{**record, **lists, "scores": scores})

    def round_at(self, size: Size, budget: int | None) -> int | None:
        """The round that is measured: the one nearest to the token budget, or the equal rollouts' without one.

        None where the run ended before: at a token budget more than one yardstick's round away nothing is equal.
        """
        if budget is None:
            return size.num_rounds if len(self.tokens) >= size.num_rounds else None
        if not self.tokens:
            return None
        nearest = min(range(len(self.tokens)), key=lambda i: abs(self.tokens[i] - budget))
        return nearest + 1 if abs(self.tokens[nearest] - budget) <= budget / size.num_rounds else None

    def rounds_to_measure(self, size: Size, budget: int | None) -> list[int]:
        """Half of the rollouts and all of them, and where the token budget is reached."""
        half = size.num_rounds // 2
        wanted = {half if len(self.tokens) >= half else None, self.round_at(size, None)}
        if budget is not None:
            wanted.add(self.round_at(size, budget))
        return sorted(number for number in wanted if number)


@dataclass(frozen=True)
class Measure:
    """A run at one budget: accuracies, the shares of method section 7, what it cost, and the share of its updates clipped."""

    seen: float
    unseen: float
    domain: float
    recovered: float
    retained: float
    updates: int
    tokens: int
    seconds: float
    clipped: float


class Study:
    """All runs with what they are measured against.

    Args:
        runs: finished runs.
        variants: what was to be compared, in the order of the tables.
        size: the equal rollouts.
        seeds: what was to be run.
        start: accuracy of the domain model on each task.
        teacher: accuracy of the general teacher on each task.
    """

    def __init__(
        self,
        runs: Iterable[Run],
        variants: Sequence[Variant],
        size: Size,
        seeds: Sequence[int],
        *,
        start: Mapping[str, float],
        teacher: Mapping[str, float],
    ) -> None:
        self.runs = {(run.variant, run.seed): run for run in runs}
        self.size, self.seeds, self.start, self.teacher = size, seeds, start, teacher
        done = {variant for variant, _ in self.runs}
        self.variants = {variant.key: variant for variant in variants if variant.key in done}

    def keys(self, *groups: str) -> list[str]:
        return [key for key, variant in self.variants.items() if variant.group in groups]

    def bases(self, group: str) -> list[str]:
        """What the variants of a group are compared with, as far as it was run."""
        named = dict.fromkeys(self.variants[key].base for key in self.keys(group))
        return [key for key in named if key in self.variants]

    def token_budget(self, key: str, seed: int) -> int | None:
        """What the yardstick with the same signal and seed trained on."""
        run = self.runs.get((f"{self.variants[key].group}/{YARDSTICK}", seed))
        number = run.round_at(self.size, None) if run else None
        return run.tokens[number - 1] if run and number else None

    def measures(self, key: str, budget: Budget) -> dict[int, Measure]:
        """Seed -> the variant at the budget; without the seeds that never got there."""
        found = {}
        for seed in self.seeds:
            run = self.runs.get((key, seed))
            limit = self.token_budget(key, seed) if budget == "tokens" else None
            if run and (budget == "rollouts" or limit is not None):
                number = run.round_at(self.size, limit)
                if number and number in run.scores:
                    found[seed] = self.at(run, number)
        return found

    def at(self, run: Run, number: int) -> Measure:
        """A run after a measured round."""
        seen, unseen, domain = (run.scores[number][task] for task in ("micro_seen", "micro_unseen", "micro_domain"))
        before, taught = (_general(scores) for scores in (self.start, self.teacher))
        steps = self.variants[run.variant].parameters.get("steps_per_round", self.size.steps_per_round)
        return Measure(
            seen=seen,
            unseen=unseen,
            domain=domain,
            recovered=((seen + unseen) / 2 - before) / (taught - before),
            retained=domain / self.start["micro_domain"],
            updates=number * steps,
            tokens=run.tokens[number - 1],
            seconds=run.seconds[number - 1],
            clipped=run.clipped[number - 1] / (number * steps),
        )

    def paired(self, key: str, other: str, budget: Budget = "rollouts", what: str = "recovered") -> Interval:
        """``key`` minus ``other`` over the seeds that both have."""
        ours, theirs = self.measures(key, budget), self.measures(other, budget)
        both = [seed for seed in self.seeds if seed in ours and seed in theirs]
        return t_interval([getattr(ours[seed], what) - getattr(theirs[seed], what) for seed in both])

    def mean(self, key: str, budget: Budget, what: str) -> float:
        return statistics.fmean(getattr(measure, what) for measure in self.measures(key, budget).values())


def _general(scores: Mapping[str, float]) -> float:
    return (scores["micro_seen"] + scores["micro_unseen"]) / 2


# --- Statistics -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """Mean with its 95 % interval, and how many values are above and below zero. NaN where there are too few values."""

    mean: float
    low: float
    high: float
    above: int
    below: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes zero, else 0."""
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        if self.mean != self.mean:
            return "n/a"
        text = f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f}), {self.above}:{self.below}"
        return f"**{text}**" if self.sign else text


def t_interval(values: Sequence[float]) -> Interval:
    """Student's t-interval of the mean: mean +- t(0.975, n - 1) s / sqrt(n), s with n - 1."""
    above, below = sum(value > 0 for value in values), sum(value < 0 for value in values)
    nan = float("nan")
    if not values:
        return Interval(nan, nan, nan, 0, 0)
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, nan, nan, above, below)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half, above, below)
