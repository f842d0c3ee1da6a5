"""What a run leaves in the store, and what it asks of the cluster's control plane."""

from __future__ import annotations

from collections.abc import Mapping

from camopd.config import Recipe
from camopd.errors import InputError, Problem
from camopd.estimate.assumptions import Lengths
from camopd.estimate.shapes import FLOAT32, ModelShape
from camopd.recipe.sections import Lora
from camopd.records import schemas
from camopd.rollout import asks_student

TEXT = {"prompt_id": 16, "branch": 8, "finish_reason": 8, "reason": 16}  # bytes a value; most are stored once and referred to
TEXT_PER_TOKEN = 4  # bytes of English a token of a vocabulary of 150,000
CHECKPOINT = 3 * FLOAT32  # bytes a parameter: itself and AdamW's two moments (checkpoint.save_checkpoint)

# Pods of pipelines/recovery.yaml on KFP 2.17 (its compiler/argocompiler/dag.go): a driver and an executor for each task, a
# driver for each graph, loop and condition, and one for each turn of a loop. A test counts them in the compiled file.
PODS_ONCE = 12  # graph, exit handler and its task, prepare, the loop of rounds, evaluate, the gate, promote
PODS_A_ROUND = 12  # turn, begin, condition, graph, rollout, the loop of branches, select, train
PODS_A_BRANCH = 3  # turn, score
# Seen once: 30 rounds of 62 pods came near the limit of 1 MB that Argo keeps a Workflow object to; its graph is in that share.
OBJECT_BYTES_A_POD = 1e6 / (30 * 62)
OBJECT_LIMIT = 1e6


def row_bytes(kind: str, numbers: Mapping[str, float]) -> float:
    """Bytes of a table's row before compression, from its Parquet schema: four for each number in a list, the width of each
    other number, and what ``TEXT`` says of a text.

    Args:
        kind: ``rollouts``, ``scored`` or ``selection``.
        numbers: how many numbers a list holds, by column, and bytes of the column ``text``.
    """
    total = 0.0
    for field in schemas()[kind]:
        if field.name in numbers:
            total += numbers[field.name] * (1 if field.name == "text" else FLOAT32)
        else:
            total += TEXT[field.name] if str(field.type) == "string" else max(field.type.bit_width // 8, 1)
    return total


def table_bytes(recipe: Recipe, samples: Mapping[str, int], lengths: Mapping[str, Lengths]) -> dict[str, float]:
    """Upper bounds by stage of the tables of a whole run; zstd takes off a tenth (log-probabilities) to a half (token ids).

    Args:
        recipe: the recipe.
        samples: of the whole run, by branch.
        lengths: by branch.
    """
    if recipe.execution == "colocated":
        return {}
    top_k = recipe.score.top_k if recipe.score.signal == "topk" else 0
    found = dict.fromkeys(("rollout", "score", "select"), 0.0)
    for name, count in samples.items():
        prompt, response = lengths[name].prompt, lengths[name].response
        own = response * top_k if asks_student(recipe) else 0
        tokens = {"prompt_ids": prompt, "response_ids": response, "logprobs": response, "text": TEXT_PER_TOKEN * response}
        rollouts = row_bytes("rollouts", tokens | {"topk_ids": own, "student_topk_logprobs": own})
        columns = {"teacher_logprobs": response, "topk_ids": response * top_k, "topk_logprobs": response * top_k}
        found["rollout"] += count * rollouts
        found["score"] += count * row_bytes("scored", columns)
        found["select"] += count * row_bytes("selection", {})
    return found


def checkpoint_bytes(shape: ModelShape, lora: Lora | None = None) -> int:
    """Of one checkpoint, without the tokenizer's files: 12 P, or 12 bytes for each parameter of an adapter that learns, and 4 P
    more where it is merged."""
    if lora is None:
        return CHECKPOINT * shape.parameters
    return CHECKPOINT * shape.adapter(lora) + FLOAT32 * shape.parameters * (lora.output == "merged")


def pods(recipe: Recipe, active: int) -> int:
    """Pods of the whole run; one where all of it is one process.

    Args:
        recipe: the recipe.
        active: branches scored, summed over the rounds.
    """
    return 1 if recipe.execution == "colocated" else PODS_ONCE + PODS_A_ROUND * recipe.num_rounds + PODS_A_BRANCH * active


def check_pods(recipe: Recipe, count: int) -> float:
    """Bytes of the Workflow object of so many pods.

    Raises:
        InputError: it would pass the limit, and the run would stop somewhere on its way.
    """
    size = count * OBJECT_BYTES_A_POD
    if size > OBJECT_LIMIT:
        fit = int(recipe.num_rounds * (OBJECT_LIMIT / OBJECT_BYTES_A_POD - PODS_ONCE) / (count - PODS_ONCE))
        what = f"{recipe.num_rounds} rounds are {count:,} pods, some {size / 1e6:.1f} MB of Workflow object; the limit is 1 MB"
        fix = f'ask for {fit} rounds at most and raise steps_per_round to match, or set execution = "colocated"'
        raise InputError([Problem("num_rounds", what, fix)])
    return size
