"""What a run has taken, by stage: seconds, GPU-seconds, tokens, bytes. Read from manifests alone.

GPU-seconds are what money is paid for: seconds times the GPUs that the stage's pods held, whether it used them or not. Not in
the books, since nobody writes it down: the starts of pods and interpreters, time in which a pod waits for a node, attempts that
were killed outright (they left a begin and no end), and what the pipeline's CPU tasks do between the stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from camopd import plan as layout
from camopd.attempts import failed_seconds
from camopd.past import known
from camopd.plan import Plan
from camopd.shards import place_of
from camopd.store import Manifest, Store

STAGES = ("prepare", "rollout", "score", "select", "train", "evaluate")
TOTAL = "total"


@dataclass(frozen=True)
class Part:
    """One finished prefix, as the books take it.

    Attributes:
        stage: one of ``STAGES``.
        manifest: of the prefix.
        failed: seconds of attempts at it that ended before they were done.
    """

    stage: str
    manifest: Manifest
    failed: float = 0.0


@dataclass(frozen=True)
class Line:
    """What one stage took in all rounds, or all of them together.

    Attributes:
        stage: its name, or ``total``.
        seconds: of its pods at work, upload included; pods side by side are added up.
        gpu_seconds: seconds times GPUs held.
        failed_seconds: of attempts that ended before they were done; not among ``seconds``.
        failed_gpu_seconds: likewise, with the GPUs that the attempt that did it held.
        waiting: share of ``seconds`` in which it waited for the store.
        tokens: sampled, scored, trained on; None where no tokens are counted.
        tokens_per_second: while the engine was at work (rollout, score), or the updates (train).
        bytes: of the files that it wrote.
    """

    stage: str
    seconds: float
    gpu_seconds: float
    failed_seconds: float
    failed_gpu_seconds: float
    waiting: float
    tokens: int | None
    tokens_per_second: float | None
    bytes: int


def ledger(parts: Iterable[Part]) -> list[Line]:
    """A line a stage that has parts, in the order of the stages, and the total last; nothing of nothing."""
    parts = list(parts)
    if not parts:
        return []
    by_stage = {stage: [part for part in parts if part.stage == stage] for stage in STAGES}
    lines = [_line(stage, own) for stage, own in by_stage.items() if own]
    # A token is sampled, scored and trained on: their sum would count nothing, and so would a rate.
    return [*lines, _line(TOTAL, parts, counts_tokens=False)]


def _line(stage: str, parts: Sequence[Part], *, counts_tokens: bool = True) -> Line:
    seconds = sum(_seconds(part) for part in parts)
    waited = sum(_with_shards(part, part.manifest.seconds_waited, "shard_seconds_waited") for part in parts)
    counted = [part.manifest.metrics for part in parts if "tokens" in part.manifest.metrics] if counts_tokens else []
    working = sum(_working_seconds(metrics) for metrics in counted)
    tokens = sum(metrics["tokens"] for metrics in counted)
    return Line(
        stage=stage,
        seconds=round(seconds, 3),
        gpu_seconds=round(sum(_seconds(part) * _gpus(part) for part in parts), 3),
        failed_seconds=round(sum(part.failed for part in parts), 3),
        failed_gpu_seconds=round(sum(part.failed * _gpus(part) for part in parts), 3),
        waiting=round(waited / seconds, 4) if seconds else 0.0,
        tokens=int(tokens) if counted else None,
        tokens_per_second=tokens / working if working else None,
        bytes=sum(_written(part) for part in parts),
    )


def _seconds(part: Part) -> float:
    return _with_shards(part, part.manifest.seconds, "shard_seconds")


def _gpus(part: Part) -> float:
    """GPUs held for a second of the part's time; shards held others than the pod that joined them."""
    own = part.manifest.seconds * part.manifest.resources.get("count", 0)
    held = _with_shards(part, own, "shard_gpu_seconds")
    return held / _seconds(part) if _seconds(part) else 0.0


def _with_shards(part: Part, own: float, key: str) -> float:
    """A joined prefix's own number and that of the shards it was made of."""
    return own + part.manifest.metrics.get(key, 0.0)


def _working_seconds(metrics: Mapping[str, Any]) -> float:
    """Seconds in which the tokens were made: the engine's own, or what the rate says."""
    rate = metrics.get("tokens_per_second")
    return metrics.get("engine_seconds", metrics["tokens"] / rate if rate else 0.0)


def _written(part: Part) -> int:
    return sum(file.size for file in part.manifest.files) + part.manifest.metrics.get("shard_bytes", 0)


def as_numbers(lines: Iterable[Line]) -> dict[str, dict[str, float]]:
    """``{stage: {"gpu_seconds": ...}}``, without what is unknown: for metrics."""
    return {
        line.stage: {name: value for name, value in asdict(line).items() if isinstance(value, int | float)} for line in lines
    }


def in_words(total: Line) -> str:
    """The whole in one line: ``2.10 GPU-hours, 17 min at work, 1,200.0 MB written``."""
    gpu = f"{total.gpu_seconds / 3600:.2f} GPU-hours" if total.gpu_seconds else "no GPU"
    failed = f", and {_time(total.failed_seconds)} in attempts that failed" if total.failed_seconds else ""
    return f"{gpu}, {_time(total.seconds)} at work{failed}, {total.bytes / 1e6:,.1f} MB written"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# --- Reading --------------------------------------------------------------------------------------------------------------


def parts_of(plan: Plan, store: Store) -> list[Part] | None:
    """Every prefix of a run that was finished but the evaluation's, or None where some are gone without a word."""
    failed = _failed(plan.run_uri, store)
    prefixes = [("prepare", layout.plan_uri(plan.run_uri))]
    prefixes += [("rollout", layout.teacher_prompts_uri(plan.run_uri, branch.name)) for branch in plan.recipe.branches]
    parts = _parts(prefixes, failed, store)
    rounds = [_parts(_of_round(plan, uri), failed, store) for uri in plan.rounds]
    done = [number for number, own in enumerate(rounds, 1) if any(part.stage == "train" for part in own)]
    staged = {"rollout", "select", "train"} if plan.recipe.execution == "staged" else {"train"}
    whole = all(staged <= {part.stage for part in own} for own in rounds[: max(done, default=0)])
    return [*parts, *(part for own in rounds for part in own)] if whole else None


def _of_round(plan: Plan, uri: str) -> list[tuple[str, str]]:
    """Stage and place of what a round leaves; a recovery in one process leaves the checkpoint alone."""
    scores = [("score", layout.score_uri(uri, branch.name)) for branch in plan.recipe.branches]
    return [
        ("rollout", layout.rollout_uri(uri)),
        *scores,
        ("select", layout.select_uri(uri)),
        ("train", layout.checkpoint_uri(uri)),
    ]


def _failed(run_uri: str, store: Store) -> dict[str, float]:
    """Seconds of failed attempts by prefix, those of shards by the prefix that they make up."""
    found: dict[str, float] = {}
    for uri, seconds in failed_seconds(run_uri, store).items():
        place = place_of(uri)
        if place.shard:
            uri = layout.score_uri(place.round_uri, place.branch) if place.branch else layout.rollout_uri(place.round_uri)
        found[uri] = found.get(uri, 0.0) + seconds
    return found


def _parts(prefixes: Iterable[tuple[str, str]], failed: Mapping[str, float], store: Store) -> list[Part]:
    found = [(stage, uri, known(uri, store)) for stage, uri in prefixes]
    return [Part(stage, done, failed.get(uri, 0.0)) for stage, uri, done in found if done is not None]
