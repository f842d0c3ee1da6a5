"""What a run asks of the cluster's control plane: pods, and the one object in which Argo keeps all of a workflow.

How many pods the compiled graph starts where is in ``pods.json``, which ``pipelines.compile`` counts and writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from camopd.config import Recipe
from camopd.errors import InputError, Problem

# Seen once: 30 rounds of 62 pods came near the limit of 1 MB that Argo keeps a Workflow object to; its graph is in that share.
OBJECT_BYTES_A_POD = 1e6 / (30 * 62)
OBJECT_LIMIT = 1e6
SHARDS_SHOWN = (1, 2, 4, 8)


@cache
def graph() -> Mapping[str, int]:
    """Pods by the loops and ways that they are started in: ``rounds/go/branches`` for each branch of a round by one pod."""
    return json.loads(Path(__file__).with_name("pods.json").read_text(encoding="utf-8"))


def pods(recipe: Recipe, active: int) -> int:
    """Pods of the whole run in the pipeline.

    Args:
        recipe: the recipe.
        active: branches scored, summed over the rounds.
    """
    rounds, shards, colocated = recipe.num_rounds, recipe.shards, recipe.execution == "colocated"
    turns = {
        "": 1.0,
        "new": 1,
        "rounds": 1 if colocated else rounds,
        "colocated": colocated,
        "go": shards == 1 and not colocated,
        "branches": active / rounds,
        "shards": shards > 1 and not colocated,
        "rollout shards": shards,
        "score shards": shards * active / rounds,
        "passed": 1,
    }
    return round(sum(count * math.prod(turns[name] for name in path.split("/")) for path, count in graph().items()))


def check_pods(recipe: Recipe, active: int) -> float:
    """Bytes of the run's Workflow object.

    Raises:
        InputError: it would pass the limit, and the run would stop somewhere on its way.
    """
    count = pods(recipe, active)
    size = count * OBJECT_BYTES_A_POD
    if size > OBJECT_LIMIT:
        rounds, shards = recipe.num_rounds, recipe.shards
        fewer = [n for n in range(1, shards) if pods(recipe.model_copy(update={"shards": n}), active) <= _most_pods()]
        asked = f"{rounds} rounds" + (f" of {shards} shards" if shards > 1 else "")
        what = f"{asked} are {count:,} pods, some {size / 1e6:.1f} MB of Workflow object; the limit is 1 MB"
        turn = [f"ask for num_rounds = {_rounds_that_fit(recipe, active)} at most and raise steps_per_round to match"]
        turn += [f"lower shards to {max(fewer)} at most"] if fewer else []
        fix = ", ".join([*turn, 'or set execution = "colocated"'])
        raise InputError([Problem("num_rounds" if shards == 1 else "num_rounds, shards", what, fix)])
    return size


def _once() -> int:
    """Pods outside of the rounds."""
    return sum(count for path, count in graph().items() if "rounds" not in path.split("/"))


def _most_pods() -> float:
    return OBJECT_LIMIT / OBJECT_BYTES_A_POD


def _rounds_that_fit(recipe: Recipe, active: int) -> int:
    """With as many branches a round as now."""
    once = _once()
    return int(recipe.num_rounds * (_most_pods() - once) / (pods(recipe, active) - once))


@dataclass(frozen=True)
class ControlPlane:
    """What one number of shards asks for.

    Attributes:
        shards: pods that share a round's sampling, and each branch's scoring.
        a_round: pods of one round, the mean.
        pods: of the run.
        object_bytes: of its Workflow object.
        most_rounds: that the object holds.
    """

    shards: int
    a_round: float
    pods: int
    object_bytes: float
    most_rounds: int


def by_shards(recipe: Recipe, active: int) -> list[ControlPlane]:
    """The same run with 1, 2, 4, 8 and the recipe's own number of shards; nothing for a run in one process."""
    if recipe.execution == "colocated":
        return []
    found = []
    for shards in sorted({*SHARDS_SHOWN, recipe.shards}):
        spread = recipe.model_copy(update={"shards": shards})
        count = pods(spread, active)
        a_round = (count - _once()) / recipe.num_rounds
        found.append(ControlPlane(shards, a_round, count, count * OBJECT_BYTES_A_POD, _rounds_that_fit(spread, active)))
    return found
