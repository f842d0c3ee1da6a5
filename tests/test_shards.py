"""Whose part is what, and that the parts are the whole again."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.config import Recipe
from camopd.engines import sample_batches, token_batches
from camopd.errors import StoreError
from camopd.rollout import share
from camopd.score import share as score_share
from camopd.shards import (
    Place,
    Shard,
    finished_parts,
    joined,
    joined_rates,
    key_of,
    part_config,
    place_of,
    rates,
    shard_uri,
    shard_uris,
)
from camopd.store import Store, join
from tests.finished import produce

BRANCHES = [
    {"name": "general", "role": "recover", "teacher": "/models/general", "prompts": "/g.jsonl"},
    {"name": "domain-2-of-4", "role": "retain", "prompts": "/d.jsonl"},
]
LENGTHS = st.lists(st.integers(1, 300), max_size=60)


def recipe_of(**changes: Any) -> Recipe:
    return Recipe.model_validate({"student": "/models/domain", "branches": BRANCHES, **changes})


def row(branch: str, number: int, *, prompt: int = 3, response: int = 2) -> dict[str, Any]:
    ids = {"prompt_ids": np.zeros(prompt, np.int32), "response_ids": np.ones(response, np.int32)}
    return {"branch": branch, "prompt_id": f"p-{number}", "sample_index": number % 2, "finish_reason": "stop", **ids}


# --- Whose part is what ---------------------------------------------------------------------------------------------------


@given(lengths=LENGTHS, count=st.integers(1, 7), size=st.integers(1, 9), budget=st.integers(1, 900))
def test_shards_are_the_whole_and_each_makes_the_batches_that_one_pod_makes(lengths, count, size, budget) -> None:
    """So that the default engine's numbers are the same to the bit: it rounds by what is computed together."""

    def by_count(own: list[int]) -> list[list[int]]:
        return sample_batches(own, size)

    def by_tokens(own: list[int]) -> list[list[int]]:
        return list(token_batches(own, budget))

    for batches_of in (by_count, by_tokens):
        whole = batches_of(lengths)
        parts = [Shard(number, count).share(whole) for number in range(1, count + 1)]
        assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
        again = [[part[i] for i in batch] for part in parts for batch in batches_of([lengths[index] for index in part])]
        assert sorted(again) == sorted(whole)


@given(lengths=st.lists(st.integers(1, 400), min_size=40, max_size=200), count=st.integers(2, 4))
def test_scoring_is_shared_out_by_tokens(lengths, count) -> None:
    """No shard has more than one batch above another: a batch is a budget of padded tokens, or one longer sample."""
    budget = 400
    rows = [row("general", number, prompt=1, response=length) for number, length in enumerate(lengths)]
    recipe = recipe_of(score={"batch_tokens": budget})
    parts = [score_share(rows, Shard(number, count), recipe) for number in range(1, count + 1)]
    assert sorted(map(key_of, (row for part in parts for row in part))) == sorted(map(key_of, rows))
    sizes = [len(list(token_batches([1 + len(row["response_ids"]) for row in part], budget))) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_requests_are_shared_out_by_model_and_keep_their_order(engine) -> None:
    recipe = recipe_of(rollout={"engine": engine, "batch_size": 2})
    wanted = [row(branch, number, prompt=number) for number in range(1, 8) for branch in ("general", "domain-2-of-4")]
    parts = [share(wanted, Shard(number, 3), recipe, [["general"], ["domain-2-of-4"]]) for number in (1, 2, 3)]
    assert sorted(key_of(row) for part in parts for row in part) == sorted(map(key_of, wanted))
    for part in parts:
        assert [key_of(row) for row in wanted if row in part] == [key_of(row) for row in part]
    # 7 requests a branch, the longest first: two batches, one and one of transformers; vLLM takes every third.
    assert [len(part) for part in parts] == [6, 4, 4]
    longest = [max(len(row["prompt_ids"]) for row in part) for part in parts]
    assert longest == ([7, 5, 3] if engine == "transformers" else [7, 6, 5])


# --- Where it lies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["rollout", "score-general", "score-domain-2-of-4"])
def test_a_prefix_tells_what_is_to_be_done(stage) -> None:
    """Also where a branch is called like a shard."""
    uri, branch = f"s3://b/run/rounds/0001/{stage}", stage.partition("-")[2]
    assert place_of(uri if branch else "s3://b/run/rounds/0001") == Place("s3://b/run/rounds/0001", branch, None)
    for shard in (Shard(1, 2), Shard(12, 16)):
        assert place_of(shard_uri(uri, shard)) == Place("s3://b/run/rounds/0001", branch, shard)


def test_a_run_below_a_folder_of_that_name_is_no_shard() -> None:
    assert place_of("/shards/rounds/0001").shard is None
    assert place_of("/shards/score-x").shard is None


def test_a_finished_prefix_is_not_spread_again(tmp_path) -> None:
    store, uri = Store(), str(tmp_path / "rounds" / "0001" / "rollout")
    assert shard_uris(uri, 1, store) == [uri]
    below = str(tmp_path / "rounds" / "0001" / "shards")
    assert shard_uris(uri, 2, store) == [join(below, "rollout-1-of-2"), join(below, "rollout-2-of-2")]
    produce(store, uri, "rollout", {"x": "x"})
    assert shard_uris(uri, 2, store) == [uri]


# --- One again ------------------------------------------------------------------------------------------------------------


ROWS = [row("general", number) for number in range(5)] + [row("domain", number) for number in range(3)]
KEYS = [key_of(each) for each in ROWS]


@given(order=st.permutations(range(len(ROWS))), cut=st.integers(0, len(ROWS)))
def test_rows_are_joined_by_id_whatever_their_order(order, cut) -> None:
    mixed = [ROWS[place] for place in order]
    found = joined("/r/rollout", KEYS, {"/r/a": mixed[:cut], "/r/b": mixed[cut:]})
    assert [key_of(each) for each in found] == KEYS


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"/r/a": ROWS[:4], "/r/b": ROWS[5:]}, r"shards of /r/rollout lack 1 of 8 samples.*sample 0 of prompt 'p-4' of branch"),
        ({"/r/a": ROWS, "/r/b": ROWS[:1]}, r"/r/b holds sample 0 of prompt 'p-0' of branch 'general', which /r/a holds, too"),
        ({"/r/a": ROWS, "/r/b": [row("general", 9)]}, r"/r/b holds sample 1 of prompt 'p-9'.*nobody asked for"),
    ],
)
def test_a_row_that_is_missing_there_twice_or_strange_is_named(tables, words) -> None:
    with pytest.raises(StoreError, match=words):
        joined("/r/rollout", KEYS, tables)


def test_parts_of_another_student_are_refused(tmp_path) -> None:
    store, uri = Store(), str(tmp_path / "0001" / "rollout")

    def make(number: int, student: str) -> None:
        shard = Shard(number, 2)
        store.produce(
            shard_uri(uri, shard),
            stage="rollout",
            config=part_config({"seed": 1}, shard),
            inputs={"student": student},
            write=lambda folder: {"n": (folder / "x").write_text("x")},
        )

    make(1, "sha256:1")
    with pytest.raises(StoreError, match=r"rollout-2-of-2 is not finished"):
        finished_parts(uri, 2, {"seed": 1}, {"student": "sha256:1"}, store)
    make(2, "sha256:2")
    with pytest.raises(StoreError, match=r"rollout-2-of-2 was made with other settings or inputs"):
        finished_parts(uri, 2, {"seed": 1}, {"student": "sha256:1"}, store)
    with pytest.raises(StoreError, match=r"rollout-1-of-2 was made with other settings"):
        finished_parts(uri, 2, {"seed": 2}, {"student": "sha256:1"}, store)


def test_the_rate_of_shards_is_that_of_one_pod(tmp_path) -> None:
    """Two pods of 10 s, of which the engines take 4 and 6 s for 300 tokens: 30 a second in each."""
    store = Store()
    parts = [produce(store, str(tmp_path / f"{n}"), "rollout", {"x": "x"}, rates(100, 2.0 * n)) for n in (2, 3)]
    found = joined_rates(300, parts)
    assert (found["num_shards"], found["engine_seconds"], found["tokens_per_second"]) == (2, 10.0, 30.0)
    assert rates(0, 0.0) == {"engine_seconds": 0.0}
