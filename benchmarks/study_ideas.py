"""Ideas past the paper that the study measures and the package does without: rules, and subclasses of ``recover.Session``.

Each takes one thing of the project's own loop and changes it; nothing here is needed to run a recovery. ``IDEAS`` names them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from camopd import score
from camopd.engines import Engine, Sample, Scores, TokenIds
from camopd.engines import transformers as engine
from camopd.engines.transformers import load_model
from camopd.plan import Plan
from camopd.presets import Preset, TokenRule, Tokens, log_ratio, presets
from camopd.recover import Session
from camopd.schedule import Schedule
from camopd.store import Store
from camopd.update import make_optimizer, update

Row = dict[str, Any]
Step = tuple[list[Row], dict[str, Any]]


# --- Rules on the dense signal: preset data -------------------------------------------------------------------------------


def forward(tokens: Tokens) -> Tensor:
    """A = pi_T / pi - 1: descends KL(pi_T || pi). Bounded by pi >= TINY, the objective multiplies by pi again."""
    return log_ratio(tokens).clamp_max(60).expm1()


def both_ways(tokens: Tokens) -> Tensor:
    """Half reverse, half forward KL."""
    return (log_ratio(tokens) + forward(tokens)) / 2


def jensen_shannon(tokens: Tokens) -> Tensor:
    """A = log m - log pi with m the mean of both: descends the Jensen-Shannon divergence, times two."""
    mean = torch.logaddexp(tokens.student_TC, tokens.teacher_TC) - math.log(2)
    return mean - tokens.student_TC


def as_preset(rule: TokenRule) -> Preset:
    return replace(presets()["alternating"], rule=rule, signals=("topk", "full"))


EXTRA_PRESETS = {"forward": as_preset(forward), "both-ways": as_preset(both_ways), "jensen-shannon": as_preset(jensen_shannon)}


@contextmanager
def extra_presets() -> Iterator[None]:
    """Let a recipe name them, for a while."""
    known = cast(dict[str, Preset], presets())
    known.update(EXTRA_PRESETS)
    try:
        yield
    finally:
        for name in EXTRA_PRESETS:
            del known[name]


# --- Advantages of the sampled token from whole distributions -------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What both models say of a response: the sampled tokens' log-probabilities (L,), and (L, V) of the whole vocabulary."""

    own: NDArray[np.float32]
    teacher: NDArray[np.float32]
    own_LV: NDArray[np.float32]
    teacher_LV: NDArray[np.float32]


Rule = Callable[[Said], NDArray[np.float32]]  # advantage of each sampled token (L,)


def plain(said: Said) -> NDArray[np.float32]:
    return said.teacher - said.own


def control_variate(said: Said) -> NDArray[np.float32]:
    """A + KL(pi || pi_T), the expectation of -A at this position (vOPD, arXiv:2605.07865)."""
    return plain(said) + (np.exp(said.own_LV) * (said.own_LV - said.teacher_LV)).sum(-1)


def control_variate_top(said: Said, k: int = 8) -> NDArray[np.float32]:
    """The same with KL over the student's top k, both renormalised on them, as in that paper's code."""
    top = np.argsort(-said.own_LV, -1)[:, :k]
    own, teacher = (np.take_along_axis(values, top, -1) for values in (said.own_LV, said.teacher_LV))
    own, teacher = (values - np.logaddexp.reduce(values, -1, keepdims=True) for values in (own, teacher))
    return control_variate(replace(said, own_LV=own, teacher_LV=teacher))


def gated(said: Said) -> NDArray[np.float32]:
    """A times s = min(p_T e^H, 1) where it is positive, times 1 - s elsewhere (UCMOPD, arXiv:2608.26735), in expectation."""
    entropy = -(np.exp(said.teacher_LV) * said.teacher_LV).sum(-1)
    sure = np.exp(np.minimum(said.teacher + entropy, 0))
    return plain(said) * np.where(plain(said) > 0, sure, 1 - sure)


@dataclass(frozen=True)
class Ruled:
    """A teacher for the sampled signal that answers log pi + A' in place of log pi_T: the loss then sees the advantage A'."""

    teacher: Engine
    student: Engine
    rule: Rule
    vocab_size: int

    def score(self, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], **options: Any) -> Iterator[tuple[int, Scores]]:
        teacher = dict(self.teacher.score(prompts, responses, top_k=self.vocab_size))
        ids = [teacher[i].topk_ids for i in range(len(prompts))]
        for i, own in self.student.score(prompts, responses, ids=ids):
            advantage = self.rule(Said(own.logprobs, teacher[i].logprobs, own.topk_logprobs, teacher[i].topk_logprobs))
            yield i, Scores(own.logprobs + advantage, ids[i][:, :0], own.topk_logprobs[:, :0])

    def sample(self, *parts: Any, **options: Any) -> Iterator[tuple[int, Sample]]:
        return self.teacher.sample(*parts, **options)


class WithRule(Session):
    """Advantages of the sampled token by a rule that needs whole distributions."""

    def __init__(self, plan: Plan, number: int, store: Store, *, rule: Rule) -> None:
        super().__init__(plan, number, store)
        self._teachers = {
            name: Ruled(teacher, self._samplers[name], rule, plan.vocab_size) for name, teacher in self._teachers.items()
        }


# --- Explorers ------------------------------------------------------------------------------------------------------------


def hot_draw(logits_NV: Tensor, uniform_N: Tensor, top_k: int = 0, *, temperature: float = 1.5, top_p: float = 0.9) -> Any:
    """``draw`` at a temperature, from the smallest set of tokens that holds ``top_p``."""
    logits = logits_NV / temperature
    ordered, ids = logits.softmax(-1).sort(-1, descending=True)
    outside = (ordered.cumsum(-1) - ordered >= top_p).scatter(1, ids, ordered.cumsum(-1) - ordered >= top_p)
    return draw(logits.masked_fill(outside, -math.inf), uniform_N, top_k)


draw = engine.draw


@dataclass(frozen=True)
class Exploring:
    """A student whose first answer to each prompt is its own and the others are hot, with their log-probabilities at T = 1."""

    student: Engine
    answers: int

    def sample(self, prompts: Sequence[TokenIds], seeds: Sequence[int], **options: Any) -> Iterator[tuple[int, Sample]]:
        anchors = [i for i in range(len(prompts)) if i % self.answers == 0]
        hot = [i for i in range(len(prompts)) if i % self.answers]
        found = self.student.sample([prompts[i] for i in anchors], [seeds[i] for i in anchors], **options)
        yield from ((anchors[i], sample) for i, sample in found)
        with mock.patch.object(engine, "draw", hot_draw):
            explored = dict(self.student.sample([prompts[i] for i in hot], [seeds[i] for i in hot], **options))
        tokens = [explored[i].token_ids for i in range(len(hot))]
        for i, scores in self.student.score([prompts[i] for i in hot], tokens):
            yield hot[i], replace(explored[i], logprobs=scores.logprobs)

    def score(self, *parts: Any, **options: Any) -> Iterator[tuple[int, Scores]]:
        return self.student.score(*parts, **options)


class Explorers(WithRule):
    """One answer at T = 1, others at T = 1.5 (UCMOPD): these stay if their mean positive advantage is the first's or more."""

    def __init__(self, plan: Plan, number: int, store: Store, *, rule: Rule) -> None:
        super().__init__(plan, number, store, rule=rule)
        self._answers = plan.recipe.rollout.samples_per_prompt
        (student,) = set(self._samplers.values())
        self._samplers = dict.fromkeys(self._samplers, Exploring(student, self._answers))

    def step(self) -> Step:
        batch, rows = self.collect()
        best = {row["prompt_id"]: mean_gain(row) for row in rows if row["sample_index"] % self._answers == 0}
        for row in rows:
            anchor = row["sample_index"] % self._answers == 0
            row["kept"] = anchor or mean_gain(row) >= best.get(row["prompt_id"], math.inf)
        return batch, self.trainer.step(batch, rows)


def mean_gain(row: Mapping[str, Any]) -> float:
    """Mean of the positive advantages of a response."""
    gains = row["teacher_logprobs"] - row["logprobs"]
    return float(gains[gains > 0].mean()) if (gains > 0).any() else 0.0


# --- Schedules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen(Schedule):
    """A schedule that is decided step by step."""

    past: tuple[str, ...] = ()
    chosen: str = ""

    @property
    def active(self) -> Mapping[str, int]:
        return {self.chosen: sum(self.cycle[0].values())}

    def taken(self, branch: str) -> int:
        return self.past.count(branch) * sum(self.cycle[0].values())


class Adaptive(Session):
    """The next branch is chosen from the gaps that each branch's steps have met so far."""

    def __init__(self, plan: Plan, number: int, store: Store) -> None:
        super().__init__(plan, number, store)
        self._names = [branch.name for branch in plan.recipe.branches]  # the one to recover, the one to retain
        self._gaps: dict[str, list[float]] = {name: [] for name in self._names}
        self.trainer.schedule = Chosen(self.trainer.schedule.cycle, chosen=self._names[0])

    def step(self) -> Step:
        batch, record = super().step()
        schedule = self.trainer.schedule
        assert isinstance(schedule, Chosen)
        self._gaps[schedule.chosen].append(record["branches"][schedule.chosen]["gap"])
        past = (*schedule.past, schedule.chosen)
        self.trainer.schedule = replace(schedule, past=past, chosen=self._choose(past))
        return batch, record

    def _choose(self, past: tuple[str, ...]) -> str:
        raise NotImplementedError


class RemainingGap(Adaptive):
    """By remaining gap times its descent, and a floor (D3-MOPD, arXiv:2608.24987), with the constants of a port of it.

    Args:
        drift: a gap that rises counts like one that falls. Without it a branch to retain, which starts at no gap and can only
            rise, is left to the floor.
    """

    floor, temperature, span, least, window, even = 0.1, 0.5, 5, 0.15, 3, 8

    def __init__(self, plan: Plan, number: int, store: Store, *, drift: bool = False) -> None:
        super().__init__(plan, number, store)
        self._drift, self._owed = drift, dict.fromkeys(self._names, 0.0)

    def _choose(self, past: tuple[str, ...]) -> str:
        if len(past) < self.even:
            return self._names[len(past) % len(self._names)]
        signals = np.array([self._signal(self._gaps[name]) for name in self._names])
        weights = np.exp(signals / max(signals.max(), 1e-9) / self.temperature)
        shares = self.floor + (1 - self.floor * len(weights)) * weights / weights.sum()
        self._owed = {name: self._owed[name] + share for name, share in zip(self._names, shares, strict=True)}
        chosen = max(self._owed, key=self._owed.__getitem__)
        self._owed[chosen] -= 1
        return chosen

    def _signal(self, gaps: Sequence[float]) -> float:
        smooth = [gaps[0]]
        for gap in gaps[1:]:
            smooth.append(smooth[-1] + (gap - smooth[-1]) * 2 / (self.span + 1))
        drops = [(before - after) / max(before, self.least) for before, after in pairwise(smooth[-self.window - 1 :])]
        drop = statistics.mean(drops) if drops else 0.0
        velocity = abs(drop) if self._drift else max(drop, 0.0)
        return smooth[-1] / max(statistics.mean(gaps[:3]), self.least) * velocity


class SpacedReview(Adaptive):
    """Review like vocabulary: a gap above the one before it halves the steps until the next review, else they double."""

    longest = 15

    def _choose(self, past: tuple[str, ...]) -> str:
        recover, retain = self._names
        wait = 3
        for before, after in pairwise(self._gaps[retain]):
            wait = max(wait // 2, 1) if after > before else min(wait * 2, self.longest)
        waited = past[::-1].index(retain) if retain in past else len(past)
        return retain if waited >= wait else recover


# --- Updates --------------------------------------------------------------------------------------------------------------


class TwoUpdates(Session):
    """Each batch is used for two updates."""

    def step(self) -> Step:
        batch, rows = self.collect()
        record = self.trainer.step(batch, rows)
        trainer, kept = self.trainer, [row for row in rows if row["kept"]]
        update(trainer.student, trainer.optimizer, kept, recipe=self.plan.recipe, vocab_size=self.plan.vocab_size)
        return batch, record


class OwnMoments(Session):
    """Each branch has its own AdamW moments."""

    def __init__(self, plan: Plan, number: int, store: Store) -> None:
        super().__init__(plan, number, store)
        names = [branch.name for branch in plan.recipe.branches]
        self._optimizers = {name: make_optimizer(self.trainer.model, plan.recipe) for name in names}

    def step(self) -> Step:
        (name,) = self.trainer.schedule.active
        self.trainer.optimizer = self._optimizers[name]
        return super().step()


class Decaying(Session):
    """The learning rate falls to zero, linearly."""

    def step(self) -> Step:
        left = 1 - self.trainer.schedule.step / self.plan.num_steps
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self.plan.recipe.train.learning_rate * left
        return super().step()


class PromptTokens(Session):
    """The prompts' own tokens are distilled, too: no rollout is needed for them."""

    def step(self) -> Step:
        batch, rows = self.collect()
        (name,) = self.trainer.schedule.active
        asked = [{**row, "prompt_ids": row["prompt_ids"][:1], "response_ids": row["prompt_ids"][1:]} for row in rows]
        prompts, responses = [row["prompt_ids"] for row in asked], [row["response_ids"] for row in asked]
        for i, own in self._samplers[name].score(prompts, responses):
            asked[i]["logprobs"] = own.logprobs
        for row, scored in zip(asked, score.score_rows(self._teachers[name], asked, self.plan), strict=True):
            row |= scored
        return batch, self.trainer.step(batch, rows + asked)


# --- The general teacher's weights ----------------------------------------------------------------------------------------


@torch.no_grad()
def move_towards(model: PreTrainedModel, other: PreTrainedModel, share: float) -> None:
    """Interpolate the weights, in place."""
    for own, theirs in zip(model.parameters(), other.parameters(), strict=True):
        own.lerp_(theirs, share)


def general_teacher(session: Session) -> PreTrainedModel:
    (teacher,) = {session.plan.teacher_uri(b) for b in session.plan.recipe.branches if b.role == "recover"}
    return load_model(session._store.fetch(teacher))


class Merged(Session):
    """The student starts as an average of the domain model and the general teacher that it came from."""

    def __init__(self, plan: Plan, number: int, store: Store, *, share: float) -> None:
        super().__init__(plan, number, store)
        move_towards(self.trainer.model, general_teacher(self), share)


class Pulled(Session):
    """After each update the weights move a little towards the general teacher's."""

    def __init__(self, plan: Plan, number: int, store: Store, *, share: float) -> None:
        super().__init__(plan, number, store)
        self._general, self._share = general_teacher(self), share

    def step(self) -> Step:
        done = super().step()
        move_towards(self.trainer.model, self._general, self._share)
        return done


IDEAS: dict[str, Callable[[Plan, int, Store], Session]] = {
    "": Session,
    "control variate": partial(WithRule, rule=control_variate),
    "control variate, top 8": partial(WithRule, rule=control_variate_top),
    "token gate": partial(WithRule, rule=gated),
    "explorers": partial(Explorers, rule=plain),
    "explorers and token gate": partial(Explorers, rule=gated),
    "gap and descent": RemainingGap,
    "gap and drift": partial(RemainingGap, drift=True),
    "spaced review": SpacedReview,
    "two updates": TwoUpdates,
    "own moments": OwnMoments,
    "decaying rate": Decaying,
    "prompt tokens": PromptTokens,
    "merged start": partial(Merged, share=0.25),
    "pulled": partial(Pulled, share=0.002),
}
