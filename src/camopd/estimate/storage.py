"""What a run leaves in the store."""

from __future__ import annotations

from collections.abc import Mapping

from camopd.config import Recipe
from camopd.estimate.assumptions import Lengths
from camopd.estimate.shapes import FLOAT32, ModelShape
from camopd.recipe.sections import Lora
from camopd.records import schemas
from camopd.rollout import asks_student

TEXT = {"prompt_id": 16, "branch": 8, "finish_reason": 8, "reason": 16}  # bytes a value; most are stored once and referred to
TEXT_PER_TOKEN = 4  # bytes of English a token of a vocabulary of 150,000
CHECKPOINT = 3 * FLOAT32  # bytes a parameter: itself and AdamW's two moments (checkpoint.snapshot)


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
