"""What is sampled for which step, from which prompts, and when a run must stop."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd import plan as layout
from camopd.config import Recipe
from camopd.engines import Sample
from camopd.engines.transformers import TransformersEngine
from camopd.errors import UnhealthyRunError
from camopd.plan import Plan
from camopd.records import write_table
from camopd.rollout import PromptTables, Row, finish_reason, health, is_empty, models, requests, sample_rows
from camopd.store import Store
from tests.tiny import VOCAB, tiny_model

RECIPE: dict[str, Any] = {
    "student": "/models/domain",
    "seed": 3,
    "steps_per_round": 8,
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_empty_fraction": 0.25},
}
GENERAL = {"name": "general", "role": "recover", "teacher": "/models/general", "prompts": "/g.jsonl", "steps": 3}
DOMAIN = {"name": "domain", "role": "retain", "prompts": "/d.jsonl", "steps": 1}
MADE_UP = {"general": 7}  # prompts that the general teacher made up


def make_plan(run_uri: str = "/runs/x", general: dict[str, Any] | None = None, **changes: Any) -> Plan:
    return Plan(
        run_uri=run_uri,
        recipe=Recipe.model_validate({**RECIPE, "branches": [{**GENERAL, **(general or {})}, DOMAIN], **changes}),
        content_ids={},
        vocab_size=20,
        eos_ids=(2,),
        pad_id=0,
        num_prompts={"general": 10, "domain": 5},
        template_id="t",
        max_prompt_tokens=64,
    )


def of_rounds(plan: Plan, *numbers: int) -> list[Row]:
    """What these rounds ask for, one after the other."""
    steps = plan.recipe.steps_per_round
    return [request for number in numbers for request in requests(plan, plan.schedule(number), steps, MADE_UP)]


# --- Requests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("method", ["camopd", "mopd-3to1"])
def test_rounds_tile_the_run_without_gap_or_overlap(method, share) -> None:
    """Rounds of eight steps, of one and of all ask for the same responses in the same order, whoever wrote the prompts."""
    general = {"teacher_prompts": share}
    in_rounds = of_rounds(make_plan(general=general, method=method), 1, 2, 3)
    assert in_rounds == of_rounds(make_plan(general=general, method=method, steps_per_round=24), 1)
    assert in_rounds == of_rounds(make_plan(general=general, method=method, steps_per_round=1), *range(1, 25))
    assert len(in_rounds) == 24 * 4 * 2
    assert [r["step"] for r in in_rounds] == sorted(r["step"] for r in in_rounds)
    keys = [(r["branch"], r["table"], r["row"], r["sample_index"]) for r in in_rounds]
    assert len(set(keys)) == len(keys)  # unique in the run, however often the prompts come round


def test_every_prompt_is_asked_equally_often() -> None:
    rows = [r["row"] for r in of_rounds(make_plan(), 1, 2, 3, 4, 5) if r["branch"] == "domain"]
    assert {rows.count(row) for row in range(5)} == {len(rows) // 5}


@given(share=st.floats(0, 1), rounds=st.integers(1, 6), steps_per_round=st.integers(1, 9))
def test_the_teacher_s_share_holds_at_any_moment(share, rounds, steps_per_round) -> None:
    plan = make_plan(general={"teacher_prompts": share}, steps_per_round=steps_per_round)
    asked = [r for r in of_rounds(plan, *range(1, rounds + 1)) if r["branch"] == "general" and r["sample_index"] % 2 == 0]
    assert abs(sum(r["table"] == "teacher" for r in asked) - share * len(asked)) < 1 + 1e-6
    by_table = {table: [r["row"] for r in asked if r["table"] == table] for table in ("file", "teacher")}
    for table, size in {"file": 10, "teacher": 7}.items():
        counts = Counter(by_table[table])
        assert max(counts.values(), default=0) - min(counts[row] for row in range(size)) <= 1, table


def test_a_branch_without_a_prompt_file_asks_its_teacher_alone() -> None:
    plan = make_plan(general={"prompts": "teacher"})
    assert {r["table"] for r in of_rounds(plan, 1) if r["branch"] == "general"} == {"teacher"}
    assert {r["table"] for r in of_rounds(plan, 1) if r["branch"] == "domain"} == {"file"}


def test_a_round_may_lack_a_branch() -> None:
    """The cycle is G, G, G, D: rounds of two steps have a domain step every other time."""
    plan = make_plan(steps_per_round=2)
    assert [{r["branch"] for r in of_rounds(plan, number)} for number in (1, 2, 3)] == [
        {"general"},
        {"general", "domain"},
        {"general"},
    ]


# --- Prompts --------------------------------------------------------------------------------------------------------------


def finish_with_prompts(store: Store, uri: str, stage: str, **tables: int) -> None:
    """A finished prefix with a prompt table each of so many rows, whose ids begin with the table's name."""

    def write(folder: Path) -> dict[str, Any]:
        for name, count in tables.items():
            rows = [{"prompt_id": f"{name}-{i}", "line": i + 1, "text": "", "token_ids": [i + 3, 9]} for i in range(count)]
            write_table(folder / f"{name}.parquet", "prompts", rows)
        return {"accepted": sum(tables.values())}

    store.produce(uri, stage=stage, config={}, inputs={}, write=write)


def test_each_request_gets_the_prompt_of_its_own_table(tmp_path) -> None:
    plan, store = make_plan(str(tmp_path / "run"), general={"teacher_prompts": 0.5}), Store()
    finish_with_prompts(store, layout.plan_uri(plan.run_uri), "prepare", **{"prompts-general": 10, "prompts-domain": 5})
    finish_with_prompts(store, layout.teacher_prompts_uri(plan.run_uri, "general"), "rollout", prompts=MADE_UP["general"])
    tables = PromptTables(plan, store)
    assert tables.num_teacher_prompts == MADE_UP
    wanted = of_rounds(plan, 1)
    tables.fill(wanted)
    for request in wanted:
        name = "prompts" if request["table"] == "teacher" else f"prompts-{request['branch']}"
        assert request["prompt_id"] == f"{name}-{request['row']}"
        assert request["prompt_ids"].tolist() == [request["row"] + 3, 9]
    assert {(r["branch"], r["table"]) for r in wanted} == {("general", "file"), ("general", "teacher"), ("domain", "file")}


# --- Sampling -------------------------------------------------------------------------------------------------------------


def sampled(plan: Plan, *, seeds: tuple[int, int]) -> list[Row]:
    """Round 1 with tiny models: one seed is one model, as where the student answers on every branch."""
    wanted = of_rounds(plan, 1)
    for request in wanted:
        request |= {"prompt_id": str(request["row"]), "prompt_ids": np.array([request["row"] + 3, 9], np.int32)}
    engines = {
        seed: TransformersEngine(tiny_model(seed), vocab_size=VOCAB, batch_size=64, batch_tokens=256) for seed in set(seeds)
    }
    done: list[int] = []
    sample_rows(dict(zip(("general", "domain"), (engines[seed] for seed in seeds), strict=True)), wanted, plan, done.append)
    assert sorted(done) == sorted(len(row["response_ids"]) for row in wanted)
    return wanted


def test_every_branch_is_answered_by_its_own_engine() -> None:
    plan = make_plan(rollout={"prompts_per_step": 2, "max_new_tokens": 6})
    first, second, both = (sampled(plan, seeds=seeds) for seeds in ((0, 0), (1, 1), (0, 1)))
    for request, by_first, by_second in zip(both, first, second, strict=True):
        expected = by_first if request["branch"] == "general" else by_second
        assert request["response_ids"].tolist() == expected["response_ids"].tolist()
        np.testing.assert_allclose(request["logprobs"], expected["logprobs"], atol=1e-5)
    assert any(a["response_ids"].tolist() != b["response_ids"].tolist() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("top_k_of", "width"), [("student", 4), ("teacher", 0)])
def test_the_student_s_top_k_comes_with_the_rollout(top_k_of, width) -> None:
    score = {"signal": "topk", "top_k": 4, "top_k_of": top_k_of}
    for row in sampled(make_plan(score=score, rollout={"prompts_per_step": 2, "max_new_tokens": 6}), seeds=(0, 0)):
        assert row["topk_ids"].shape == row["student_topk_logprobs"].shape == (len(row["response_ids"]), width)


def test_each_model_answers_all_its_branches_and_is_loaded_once() -> None:
    """One after the other: a device need not hold two."""
    extra = {"name": "other", "role": "retain", "prompts": "/o.jsonl"}  # the frozen student teaches here, as for `domain`
    plan = make_plan(branches=[GENERAL, DOMAIN, extra])
    assert models(plan, 1) == {"/models/domain": ["general", "domain", "other"]}
    assert models(plan, 2) == {layout.checkpoint_uri(plan.rounds[0]): ["general", "domain", "other"]}
    by_teacher = make_plan(branches=[GENERAL, DOMAIN, extra], rollout={"sampler": "teacher"})
    assert models(by_teacher, 2) == {"/models/general": ["general"], "/models/domain": ["domain", "other"]}


# --- Health ---------------------------------------------------------------------------------------------------------------


def make_rows(**kinds: int) -> list[dict]:
    return [
        {"branch": branch, "finish_reason": kind, "response_ids": np.array([5, 2], np.int32), "entropy": 0.5}
        for branch in ("general", "domain")
        for kind, count in kinds.items()
        for _ in range(count)
    ]


def test_headline_numbers_by_branch() -> None:
    numbers = health(make_rows(stop=5, length=3, empty=1, invalid=1), make_plan(), {})
    assert numbers["domain/mean_length"] == 2
    assert numbers["general/cut_share"] == 0.3
    assert numbers["general/empty_share"] == numbers["general/invalid_share"] == 0.1


def test_a_branch_without_a_step_in_the_round_has_no_numbers() -> None:
    rows = [row for row in make_rows(stop=2) if row["branch"] == "general"]
    assert {name.partition("/")[0] for name in health(rows, make_plan(), {"domain/mean_length": 9.0})} == {"general"}


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
    nothing = np.empty((len(ids), 0))
    sample = Sample(np.array(ids, np.int32), np.full(len(ids), -1.0, np.float32), 0.1, "stop", nothing, nothing)
    assert finish_reason(sample, make_plan()) == reason
