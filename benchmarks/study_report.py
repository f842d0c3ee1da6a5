"""docs/results.md from the study's numbers: tables, and sentences that the intervals decide. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from page import machine, table
from study_numbers import Budget, Interval, Measure, Study

TOPK_BEST = "topk/alternating-scaled"  # what the longer runs are of
CONTROLS = ("mopd", "mopd-3to1", "alternating-scaled")
KEPT = 0.95  # mean retained share below which nothing is recommended
SIGNALS = {"sampled": "the sampled token's log-probability, as in the paper", "topk": "the teacher's top 8, as in the recipe"}
BUDGETS: dict[Budget, str] = {"rollouts": "equal rollouts", "tokens": "equal backward tokens"}


@dataclass(frozen=True)
class Published:
    """Means of the general and of the domain benchmarks in the paper, one run each (method section 7)."""

    role_play: tuple[float, float]
    medical: tuple[float, float]


PAPER_START, PAPER_TEACHER = Published((30.88, 41.08), (41.02, 54.54)), Published((53.39, 30.92), (53.36, 48.13))
PAPER = {
    "off-policy-kd": Published((42.12, 40.31), (41.78, 53.82)),
    "mopd": Published((43.78, 42.86), (42.29, 54.79)),
    "selectkd": Published((44.76, 41.79), (43.34, 54.65)),
    "relaxed": Published((45.26, 43.28), (43.35, 55.03)),
    "mopd-3to1": Published((46.10, 42.00), (43.19, 54.55)),
    "alternating": Published((46.51, 42.60), (44.63, 54.59)),
    "alternating-scaled": Published((47.21, 43.46), (44.94, 54.61)),
    "camopd": Published((49.07, 45.00), (45.84, 54.71)),
}
COSTS = {
    "updates": ("updates", "{:.0f}"),
    "backward tokens": ("tokens", "{:,.0f}"),
    "processor seconds": ("seconds", "{:.1f}"),
    "updates clipped": ("clipped", "{:.2f}"),
}
# (worse, better, what it says) wherever both of the paper's studies agree on the general benchmarks
CLAIMS = (
    ("off-policy-kd", "mopd", "the student's own answers teach more than the teachers'"),
    ("mopd", "selectkd", "token acceptance helps"),
    ("mopd", "relaxed", "a floor under the advantage helps"),
    ("mopd", "mopd-3to1", "more general prompts help"),
    ("mopd-3to1", "alternating", "turns are better than a mixture"),
    ("alternating", "alternating-scaled", "a doubled general advantage helps"),
    ("alternating-scaled", "camopd", "selection helps"),
    ("mopd", "camopd", "all of it together helps"),
)


# --- Words and tables -------------------------------------------------------------------------------------------------------


def listed(names: Sequence[str]) -> str:
    """``a, b and c``; ``none``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) or "none"


def code(key: str) -> str:
    """A variant in a sentence."""
    group, _, name = key.partition("/")
    return f"`{name}` ({group})" if group in SIGNALS else f'"{name}"'


def short(key: str) -> str:
    """A variant in a sentence where its group is known."""
    return f"`{key.partition('/')[2]}`"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def label(study: Study, key: str) -> str:
    """Name in a table, with what is missing of its seeds."""
    stopped = sum(bool(run.stopped) for (variant, _), run in study.runs.items() if variant == key)
    name = study.variants[key].name
    return f"{name} ({stopped} of {len(study.seeds)} stopped themselves)" if stopped else name


def means(found: Sequence[Measure], name: str, form: str) -> str:
    return form.format(statistics.fmean(getattr(measure, name) for measure in found)) if found else "n/a"


def levels(study: Study, keys: Sequence[str], budget: Budget) -> str:
    """Scores and costs of some variants at a budget, means over seeds."""
    header = ["", "seeds", "recovered share", "seen kinds", "unseen kinds", "domain"]
    rows = []
    for key in keys:
        found = list(study.measures(key, budget).values())
        scores = ("recovered", "seen", "unseen", "domain")
        cells = [spread([getattr(m, name) for m in found]) if found else "n/a" for name in scores]
        costs = [means(found, name, form) for name, form in COSTS.values()]
        rows.append([label(study, key), str(len(found)), *cells, *costs])
    return table([*header, *COSTS], rows)


def differences(study: Study, group: str, budget: Budget) -> str:
    """Recovered share of each preset minus that of the controls."""
    controls = [name for name in CONTROLS if f"{group}/{name}" in study.variants]
    rows = []
    for key in study.keys(group):
        others = [f"{group}/{name}" for name in controls]
        rows.append([label(study, key), *("" if key == other else str(study.paired(key, other, budget)) for other in others)])
    return table(["recovered share", *(f"minus {name}" for name in controls)], rows)


def apart(study: Study, keys: Sequence[str], other: str, budget: Budget) -> str:
    """Seen kinds, unseen kinds and domain apart: accuracy minus that of one control."""
    parts = ("seen", "unseen", "domain")
    rows = [[label(study, k), *(str(study.paired(k, other, budget, part)) for part in parts)] for k in keys if k != other]
    return table(["accuracy", *(f"{part}, minus {study.variants[other].name}" for part in parts)], rows)


# --- Sentences that the numbers decide ---------------------------------------------------------------------------------------


def verdict(difference: Interval) -> str:
    if difference.mean != difference.mean:
        return "not measured"
    return {1: "agrees", -1: "the opposite", 0: "not decided"}[difference.sign]


def claims(study: Study) -> str:
    """The paper's order, claim by claim, against ours."""
    places: list[tuple[str, Budget]] = [(group, budget) for group in SIGNALS for budget in BUDGETS]
    rows = []
    for worse, better, says in CLAIMS:
        role, medical = (getattr(PAPER[better], n)[0] - getattr(PAPER[worse], n)[0] for n in ("role_play", "medical"))
        cells = []
        for group, budget in places:
            keys = [f"{group}/{name}" for name in (better, worse)]
            known = all(key in study.variants for key in keys)
            difference = study.paired(keys[0], keys[1], budget) if known else None
            cells.append(f"{verdict(difference)}: {difference}" if difference else "")
        rows.append([f"{better} over {worse}: {says}", f"{role:+.2f} / {medical:+.2f}", *cells])
    header = ["what the paper's order says", "paper, points", *(f"{group}, {BUDGETS[budget]}" for group, budget in places)]
    return table(header, rows)


def count_claims(study: Study, group: str, budget: Budget) -> str:
    """How many of the claims hold, in one sentence."""
    said: dict[str, list[str]] = {}
    for worse, better, _ in CLAIMS:
        if {f"{group}/{worse}", f"{group}/{better}"} <= study.variants.keys():
            word = verdict(study.paired(f"{group}/{better}", f"{group}/{worse}", budget))
            said.setdefault(word, []).append(f"{better} over {worse}")
    parts = [f"{word} {len(names)} ({', '.join(names)})" for word, names in sorted(said.items())] or ["nothing to compare"]
    return f"Signal {group}, {BUDGETS[budget]}: {'; '.join(parts)}."


def decided(study: Study, keys: Iterable[str], other: str, budget: Budget, what: str = "recovered") -> str:
    """Which variants the intervals put above and below another one, best first."""
    found = {key: study.paired(key, other, budget, what) for key in keys if key != other}
    ordered = sorted((key for key in found if found[key].sign), key=lambda key: -found[key].mean)
    up, down = ([f"{short(k)} {found[k].mean:+.3f}" for k in ordered if found[k].sign == sign] for sign in (1, -1))
    undecided = [short(key) for key, interval in found.items() if not interval.sign]
    return f"above: {listed(up)}; below: {listed(down)}; not told apart: {listed(undecided)}"


def ranked(study: Study, keys: Iterable[str], budget: Budget) -> list[str]:
    """Variants with every seed at the budget that keep the domain, by mean recovered share, best first."""
    whole = [key for key in keys if len(study.measures(key, budget)) == len(study.seeds)]
    kept = [key for key in whole if study.mean(key, budget, "retained") >= KEPT]
    return sorted(kept, key=lambda key: -study.mean(key, budget, "recovered"))


def recommendation(study: Study) -> list[str]:
    """What to use, and why: the best mean at equal rollouts, and what the intervals say of it."""
    lines = []
    best: dict[Budget, str] = {}
    for budget in BUDGETS:
        order = ranked(study, study.keys(*SIGNALS), budget)
        if order:
            best[budget] = order[0]
    if "rollouts" not in best:
        return [f"Nothing is recommended: no preset has all seeds and keeps {KEPT} of the domain."]
    top = best["rollouts"]
    shares = [study.mean(top, "rollouts", name) for name in ("recovered", "retained")]
    group, _, name = top.partition("/")
    found = {key: study.paired(key, top) for key in ranked(study, study.keys(*SIGNALS), "rollouts") if key != top}
    rivals = [key for key, interval in found.items() if interval.sign == 0]
    frugal = min([top, *rivals], key=lambda key: study.mean(key, "rollouts", "tokens"))
    lines.append(
        f'**Recommended: `method = "{name}"` with `score.signal = "{group}"`.** At equal rollouts it has the highest mean '
        f"recovered share, {shares[0]:.3f}, of the presets and signals that retain at least {KEPT} of the domain (its own "
        f"retained share: {shares[1]:.3f}). Rollouts come first, since long answers make sampling the dearest part of a large "
        f"run. The paired intervals put {len(found) - len(rivals)} of the {len(found)} others below it; "
        f"not told apart from it: {listed([code(key) for key in rivals])}. Of all these {code(frugal)} trains on the fewest "
        f"tokens, {study.mean(frugal, 'rollouts', 'tokens'):,.0f}. The best of several means is a flattered one."
    )
    if "tokens" in best:
        other = best["tokens"]
        same = "the same one" if other == top else code(other)
        lines.append(
            f"Where backward passes are what is dear, the highest mean at equal backward tokens is {same}: "
            f"{study.mean(other, 'tokens', 'recovered'):.3f}, for {study.mean(other, 'tokens', 'updates'):.0f} updates "
            f"of as many rollouts each."
        )
    gains = {key: study.paired(key, top) for key in study.keys("options") if study.measures(key, "rollouts")}
    better = sorted((key for key in gains if gains[key].sign > 0), key=lambda key: -gains[key].mean)
    told = [f"{code(key)} {gains[key].mean:+.3f} ({study.mean(key, 'rollouts', 'retained'):.3f})" for key in better]
    lines.append(
        "Options that recover more than the recommendation at equal rollouts, by intervals that exclude zero, with the "
        f"retained share in brackets: {listed(told)}."
    )
    return lines


def domain_lost(study: Study) -> str:
    """Which presets do not keep the domain."""
    lost = [
        f"{code(key)} {study.mean(key, 'rollouts', 'retained'):.3f}"
        for key in study.keys(*SIGNALS)
        if study.measures(key, "rollouts") and study.mean(key, "rollouts", "retained") < KEPT
    ]
    return f"Presets with a mean retained share under {KEPT} at equal rollouts: {listed(lost)}."


def unseen_gap(study: Study) -> str:
    """Whether anything closes the gap on the kinds of task that no prompt covers."""

    def best(groups: Sequence[str]) -> str | None:
        keys = [key for key in study.keys(*groups) if study.measures(key, "rollouts")]
        return max(keys, key=lambda key: study.mean(key, "rollouts", "unseen"), default=None)

    taught, start = study.teacher["micro_unseen"], study.start["micro_unseen"]
    parts = [f"On the unseen kinds the teacher has {taught:.3f}, the start {start:.3f}."]
    for what, groups in (("preset", list(SIGNALS)), ("option", ["options"])):
        key = best(groups)
        if key:
            reached = study.mean(key, "rollouts", "unseen")
            parts.append(f"The best {what} there is {code(key)} with {reached:.3f}, {taught - reached:.3f} below the teacher.")
    return " ".join(parts)


def same_runs(study: Study) -> str:
    """Whether a doubled general advantage changes anything in turns, where a clipped gradient has one length."""
    pairs = [(f"{group}/alternating", f"{group}/alternating-scaled") for group in SIGNALS]
    told = []
    for plain, scaled in pairs:
        ours, theirs = (study.measures(key, "rollouts") if key in study.variants else {} for key in (plain, scaled))
        both = [seed for seed in ours if seed in theirs]
        same = sum(
            (ours[s].seen, ours[s].unseen, ours[s].tokens) == (theirs[s].seen, theirs[s].unseen, theirs[s].tokens) for s in both
        )
        if both:
            clipped = statistics.fmean(ours[seed].clipped for seed in both)
            told.append(f"{same} of {len(both)} seeds ({study.variants[plain].group}, {clipped:.0%} of the updates clipped)")
    return (
        f"`alternating-scaled` and `alternating` gave the same scores from the same tokens in {listed(told)}. Where every step "
        "has one branch and its gradient is longer than `train.max_grad_norm`, clipping undoes a factor on the advantage; how "
        "the paper clips is not published."
    )


def stops(study: Study) -> str:
    """Runs that stopped themselves, each with its reason."""
    found = [f"- {code(run.variant)}, seed {run.seed}: {run.stopped}" for run in study.runs.values() if run.stopped]
    return "\n".join(["Runs that stopped themselves:", "", *found]) if found else "No run stopped itself."


# --- The page ---------------------------------------------------------------------------------------------------------------


def page(study: Study) -> str:
    """docs/results.md."""
    sections = [header(study), "## In short", *summary(study), "## What the paper's order predicts", *paper_section(study)]
    for group, what in SIGNALS.items():
        if study.keys(group):
            sections += [f"## Signal {group}: {what}", *signal_section(study, group)]
    if all(study.keys(group) for group in SIGNALS):
        sections += ["## What the denser signal is worth", signal_worth(study)]
    if study.keys("options"):
        sections += ["## Options", *option_section(study)]
    if study.bases("longer"):
        sections += ["## At twice the rollouts", *longer_section(study)]
    return "\n\n".join([*sections, "## Stopped runs", stops(study), "## How to read this", *reading(study)]) + "\n"


def header(study: Study) -> str:
    size, seeds = study.size, study.seeds
    updates = size.num_rounds * size.steps_per_round
    return f"""# Results: which method, which signal

Made by `python benchmarks/study.py --seeds {len(seeds)}`, two runs at a time on {machine("lm-eval", note="one thread each")}.
{len(study.runs)} runs, in `benchmarks/results/study.jsonl`.
Micro example (`recipes/micro.toml`), seeds {seeds[0]} to {seeds[-1]}, {size.rollouts:,} rollouts in {updates} updates.

Equal backward tokens: as many response tokens as `alternating` trained on at those rollouts with the same seed and signal, to
the nearest round. What trains on fewer tokens an update goes on for longer. A seed gives every variant the same prompts in the
same order, so differences are paired by seed."""


def summary(study: Study) -> list[str]:
    lines = [*recommendation(study), domain_lost(study), unseen_gap(study)]
    if {"sampled/mopd", "sampled/camopd"} <= study.variants.keys():
        said = [f"{study.paired('sampled/camopd', 'sampled/mopd', budget)} at {name}" for budget, name in BUDGETS.items()]
        lines.append(f"The paper's headline, `camopd` over `mopd` with the sampled token: {'; '.join(said)}.")
    return ["\n".join(f"- {line}" for line in lines)]


def paper_section(study: Study) -> list[str]:
    def share(published: Published, name: str) -> str:
        start, teacher = (getattr(model, name)[0] for model in (PAPER_START, PAPER_TEACHER))
        return f"{(getattr(published, name)[0] - start) / (teacher - start):.3f}"

    def ours(name: str, group: str) -> str:
        key = f"{group}/{name}"
        found = key in study.variants and study.measures(key, "rollouts")
        return f"{study.mean(key, 'rollouts', 'recovered'):.3f}" if found else ""

    rows = [
        [name, share(published, "role_play"), share(published, "medical"), *(ours(name, group) for group in SIGNALS)]
        for name, published in PAPER.items()
    ]
    counts = [count_claims(study, group, budget) for group in SIGNALS for budget in BUDGETS if study.keys(group)]
    return [
        "Recovered share, the paper's one run on each of two models (arXiv:2605.27115; method section 7) beside our means at "
        "equal rollouts:",
        table(["", "paper, role-play 4B", "paper, medical 8B", *(f"micro, {group}" for group in SIGNALS)], rows),
        "Each step of that order, as a paired difference of recovered shares; bold where the interval excludes zero:",
        claims(study),
        "\n".join(f"- {count}" for count in counts),
        same_runs(study),
    ]


def signal_section(study: Study, group: str) -> list[str]:
    keys, first = study.keys(group), f"{group}/mopd"
    parts = []
    for budget, name in BUDGETS.items():
        parts += [f"### {name.capitalize()}, signal {group}", levels(study, keys, budget), differences(study, group, budget)]
        if first in study.variants:
            parts += [f"Recovered share against `mopd`, {decided(study, keys, first, budget)}."]
            unfold = "<details><summary>Seen kinds, unseen kinds and domain apart</summary>"
            parts += [unfold, apart(study, keys, first, budget), "</details>"]
    images = (("", "Recovered and retained share"), ("-budget", "Recovered share against updates and backward tokens"))
    return parts + [f"![{title}, signal {group}](images/study-{group}{suffix}.svg)" for suffix, title in images]


def signal_worth(study: Study) -> str:
    names = [study.variants[key].name for key in study.keys("topk") if f"sampled/{study.variants[key].name}" in study.variants]
    parts = ("recovered", "seen", "unseen", "domain")
    rows = [[name, *(str(study.paired(f"topk/{name}", f"sampled/{name}", "rollouts", p)) for p in parts)] for name in names]
    return table(["topk minus sampled, equal rollouts", *parts], rows)


def option_section(study: Study) -> list[str]:
    parts = ["Each changes its baseline in one thing or a few, at equal rollouts; benchmarks/study_ideas.py has the loops."]
    for base in study.bases("options"):
        parts += [f"### Options of {code(base)}", *against_base(study, "options", base)]
    return [*parts, "![Recovered and retained share of the options](images/study-options.svg)"]


def longer_section(study: Study) -> list[str]:
    (base,) = study.bases("longer")
    what = f"{code(TOPK_BEST)} with {2 * study.size.rollouts:,} rollouts in twice as many updates: "
    return [what + "do more kinds of prompts need more time?", *against_base(study, "longer", base)]


def against_base(study: Study, group: str, base: str) -> list[str]:
    """What changes a baseline, the largest gain first."""
    keys = [key for key in study.keys(group) if study.variants[key].base == base]
    keys = sorted(keys, key=lambda key: -study.paired(key, base).mean if study.measures(key, "rollouts") else math.inf)
    measures = ("recovered", "seen", "unseen", "domain")
    rows = [[label(study, key), *(str(study.paired(key, base, what=what)) for what in measures)] for key in keys]
    return [
        levels(study, [base, *keys], "rollouts"),
        table(["minus the baseline", "recovered share", "seen kinds", "unseen kinds", "domain"], rows),
        f"Recovered share: {decided(study, keys, base, 'rollouts')}.",
        f"Domain: {decided(study, keys, base, 'rollouts', 'domain')}.",
    ]


def reading(study: Study) -> list[str]:
    return [
        f"""Recovered share: (general score - start) / (general teacher - start), the general score being the mean of seen and
unseen kinds; the start has {_scores(study.start)}, the general teacher {_scores(study.teacher)} (seen, unseen, domain).
Retained share: domain score over the start's. ± is the standard deviation over seeds.""",
        f"""A difference is the mean over seeds with its 95 % t-interval, then how many seeds lie above and below zero. With
{len(study.seeds)} seeds it finds large effects only: *not decided* is not *equal*. Every interval is for itself: of twenty
comparisons without an effect, one is expected to look like one.""",
        """Seeds change prompts and samples, not models: the intervals say what another seed would give on these two models,
and nothing of other models.""",
        "Seconds are of the processor, for sampling, scoring and training of one run, without evaluation.",
    ]


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{scores[task]:.3f}" for task in ("micro_seen", "micro_unseen", "micro_domain"))
