"""What the teachers are asked about a round's samples, and what is made of their answers."""

from typing import Any

import numpy as np
import pytest
import torch

from camopd.config import Recipe
from camopd.engines.transformers import TransformersEngine
from camopd.plan import Plan
from camopd.score import headline, is_scored, score_rows
from tests.tiny import EOS, VOCAB, tiny_model


def make_plan(**score: Any) -> Plan:
    branches = [
        {"name": "general", "role": "recover", "teacher": "/models/general", "prompts": "/g.jsonl"},
        {"name": "domain", "role": "retain", "prompts": "/d.jsonl"},
    ]
    recipe = Recipe.model_validate({"student": "/models/domain", "branches": branches, "score": score})
    return Plan("/runs/x", recipe, {}, VOCAB, (EOS,), 0, {"general": 10, "domain": 5}, "t", 64)


def row(response: list[int], finish_reason: str = "stop", sample_index: int = 0) -> dict[str, Any]:
    """A sample of the student; its log-probabilities are made up."""
    return {
        "branch": "general",
        "step": 3,
        "prompt_id": "g-1",
        "sample_index": sample_index,
        "prompt_ids": np.array([5, 9, 7], np.int32),
        "response_ids": np.array(response, np.int32),
        "logprobs": np.full(len(response), -1.0, np.float32),
        "topk_ids": np.array([[4, 8]] * len(response), np.int32),
        "finish_reason": finish_reason,
    }


ROWS = [row([6, 11, EOS], sample_index=0), row([20, 3], "length", 1), row([EOS], "empty", 2), row([VOCAB], "invalid", 3)]


def expected(sample: dict[str, Any]) -> np.ndarray:
    """log pi_T (L, V) at the response's positions by one plain float64 forward pass."""
    ids = torch.from_numpy(np.concatenate([sample["prompt_ids"], sample["response_ids"]])).long()[None]
    with torch.no_grad():
        logprobs = tiny_model(7).double()(ids).logits[0].log_softmax(-1)
    return logprobs[len(sample["prompt_ids"]) - 1 : -1].numpy()


def scored(**score: Any) -> list[dict[str, Any]]:
    engine = TransformersEngine(tiny_model(7), vocab_size=VOCAB, batch_size=8, batch_tokens=16)
    return score_rows(engine, ROWS, make_plan(**score))


@pytest.mark.parametrize("empty_answers", ["skip", "score"])
def test_what_has_no_answer_is_left_out_unless_the_recipe_says_otherwise(empty_answers) -> None:
    recipe = make_plan(empty_answers=empty_answers).recipe
    assert [is_scored(sample, recipe) for sample in ROWS] == [True, True, empty_answers == "score", False]
    assert not is_scored(row([], "empty"), recipe)
    assert [found["sample_index"] for found in scored(empty_answers=empty_answers)] == [0, 1, 2][
        : 2 + (empty_answers == "score")
    ]


def test_the_teacher_scores_the_student_s_own_tokens() -> None:
    for sample, found in zip(ROWS, scored(signal="sampled"), strict=False):
        assert (found["branch"], found["step"], found["prompt_id"]) == ("general", 3, "g-1")
        chosen = np.take_along_axis(expected(sample), sample["response_ids"][:, None].astype(np.int64), 1)[:, 0]
        np.testing.assert_allclose(found["teacher_logprobs"], chosen, atol=1e-4)
        assert found["topk_ids"].shape == (len(sample["response_ids"]), 0)


@pytest.mark.parametrize("top_k", [3, 100])
def test_the_teacher_s_most_likely_tokens(top_k) -> None:
    """More than the vocabulary holds is the vocabulary."""
    for sample, found in zip(ROWS, scored(signal="topk", top_k=top_k), strict=False):
        best = np.argsort(-expected(sample), axis=-1)[:, :top_k]
        assert found["topk_ids"].tolist() == best.tolist()
        np.testing.assert_allclose(found["topk_logprobs"], np.take_along_axis(expected(sample), best, 1), atol=1e-4)


def test_the_student_s_most_likely_tokens_are_scored_as_they_are() -> None:
    for sample, found in zip(ROWS, scored(signal="topk", top_k=2, top_k_of="student"), strict=False):
        assert found["topk_ids"].tolist() == sample["topk_ids"].tolist()
        np.testing.assert_allclose(found["topk_logprobs"], expected(sample)[:, [4, 8]], atol=1e-4)


def test_headline_numbers() -> None:
    """Gaps |-3 + 1|, |-1 + 1| and |0 + 1|; the two tokens hold 0.75 and 0.5 and 0.25 of the mass."""
    found = [
        {"prompt_id": "g-1", "sample_index": 0, "teacher_logprobs": np.array([-3.0, -1.0, 0.0]),
         "topk_logprobs": np.log([[0.5, 0.25], [0.25, 0.25], [0.125, 0.125]])},
    ]  # fmt: skip
    assert headline(found, ROWS) == pytest.approx({"num_samples": 1, "tokens": 3, "mean_gap": 1.0, "topk_mass": 0.5})
    assert headline([], ROWS) == {"num_samples": 0, "tokens": 0}
