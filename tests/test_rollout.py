import pytest

from camopd.config import Recipe
from camopd.engines import Sample
from camopd.errors import UnhealthyRunError
from camopd.plan import Plan
from camopd.rollout import finish_reason, health, is_empty, requests

RECIPE = {
    "student": "/models/domain",
    "seed": 3,
    "cycles_per_round": 2,
    "branches": [
        {"name": "general", "role": "recover", "teacher": "/models/general", "prompts": "/g.jsonl", "steps": 3},
        {"name": "domain", "role": "retain", "prompts": "/d.jsonl"},
    ],
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_empty_fraction": 0.25},
}


def make_plan(**changes) -> Plan:
    return Plan(
        run_uri="/runs/x",
        recipe=Recipe.model_validate({**RECIPE, **changes}),
        content_ids={},
        vocab_size=20,
        eos_ids=(2,),
        pad_id=0,
        num_prompts={"general": 10, "domain": 5},
        template_id="t",
    )


def test_rounds_tile_the_run_without_gap_or_overlap() -> None:
    """Three rounds of two cycles ask for what one round of six cycles asks for, in the same order."""
    plan = make_plan()
    in_rounds = [request for number in (1, 2, 3) for request in requests(plan, number)]
    assert in_rounds == requests(make_plan(cycles_per_round=6), 1)
    assert len(in_rounds) == 24 * 4 * 2
    assert [r["step"] for r in in_rounds] == sorted(r["step"] for r in in_rounds)
    keys = [(r["branch"], r["row"], r["sample_index"]) for r in in_rounds]
    assert len(set(keys)) == len(keys)  # (prompt, sample index) is unique in the run, however often the prompts come round


def test_every_prompt_is_asked_equally_often() -> None:
    rows = [r["row"] for number in range(1, 6) for r in requests(make_plan(), number) if r["branch"] == "domain"]
    assert {rows.count(row) for row in range(5)} == {len(rows) // 5}


def make_rows(**kinds: int) -> list[dict]:
    return [
        {"branch": branch, "finish_reason": kind, "response_ids": [5, 2], "entropy": 0.5}
        for branch in ("general", "domain")
        for kind, count in kinds.items()
        for _ in range(count)
    ]


def test_headline_numbers_by_branch() -> None:
    numbers = health(make_rows(stop=5, length=3, empty=1, invalid=1), make_plan(), {})
    assert numbers["domain/mean_length"] == 2
    assert numbers["general/cut_share"] == 0.3
    assert numbers["general/empty_share"] == numbers["general/invalid_share"] == 0.1


def test_too_many_empty_responses_stop_the_run_with_a_hint() -> None:
    health(make_rows(stop=3, empty=1), make_plan(), {})
    with pytest.raises(UnhealthyRunError, match=r"50% .* branch 'general' are empty.*chat template"):
        health(make_rows(stop=1, empty=1), make_plan(), {})


def test_exploding_lengths_stop_the_run() -> None:
    health(make_rows(stop=4), make_plan(), {"general/mean_length": 0.25, "domain/mean_length": 0.25})
    with pytest.raises(UnhealthyRunError, match=r"branch 'domain' have grown from 0 to 2 tokens"):
        health(make_rows(stop=4), make_plan(), {"general/mean_length": 2.0, "domain/mean_length": 0.2})


def test_only_end_tokens_is_empty() -> None:
    assert is_empty([2], [2])
    assert is_empty([], [2])
    assert not is_empty([7, 2], [2])


@pytest.mark.parametrize(("ids", "reason"), [([2], "empty"), ([7, 2], "stop"), ([7, 20], "invalid"), ([7, 19], "stop")])
def test_finish_reasons(ids, reason) -> None:
    """An id that the tokenizer does not have (20 of 0 .. 19) makes the sample invalid: it is counted and never scored."""
    assert finish_reason(Sample(ids, [-1.0] * len(ids), 0.1, "stop"), make_plan()) == reason
