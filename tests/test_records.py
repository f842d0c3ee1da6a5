"""Tables of arrays: what is written comes back, to the bit."""

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd.records import PromptTable, _values, open_table, read_metadata, read_table, write_table

KEY = {"prompt_id": "a", "sample_index": 0, "branch": "general", "step": 3}
FLOATS = st.floats(width=32, allow_nan=False)


def scored_row(length: int, k: int, number: int = 0) -> dict:
    """Numbers that no decimal writes exactly."""
    rng = np.random.default_rng(number)
    return {
        **KEY,
        "prompt_id": f"p{number}",
        "teacher_logprobs": rng.normal(size=length).astype(np.float32),
        "topk_ids": rng.integers(0, 2**31 - 1, (length, k), dtype=np.int32),
        "topk_logprobs": rng.normal(size=(length, k)).astype(np.float32),
    }


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """Rows in order, columns in order; arrays with their type, shape and bits."""
    assert [list(row) for row in found] == [list(row) for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if isinstance(value, np.ndarray):
                assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
                assert ours[name].tobytes() == value.tobytes()
            else:
                assert ours[name] == value


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 4), max_size=5), k=st.integers(0, 3))
def test_arrays_come_back_in_the_order_they_were_written(tmp_path_factory, lengths: list[int], k: int) -> None:
    """Responses of any length, K most likely tokens or none, and tables without rows."""
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    rows = [scored_row(length, k, number) for number, length in enumerate(lengths)]
    write_table(path, "scored", rows)
    if any(lengths):
        assert_same(read_table(path, "scored"), rows)
    else:  # without a single position there is no K to tell
        assert [(row["prompt_id"], len(row["topk_ids"])) for row in read_table(path, "scored")] == [
            (row["prompt_id"], 0) for row in rows
        ]


@settings(deadline=None, max_examples=50)
@given(st.lists(FLOATS, min_size=1), st.text(st.characters(exclude_categories=["Cs"])))
def test_float32_and_text_are_exact(tmp_path_factory, numbers: list[float], text: str) -> None:
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    values = np.array(numbers, np.float32)
    row = {
        **KEY,
        "prompt_ids": np.array([1, 2], np.int32),
        "response_ids": np.arange(len(values), dtype=np.int32),
        "logprobs": values,
        "topk_ids": np.empty((len(values), 0), np.int32),
        "student_topk_logprobs": np.empty((len(values), 0), np.float32),
        "entropy": 0.5,
        "finish_reason": "stop",
        "text": text,
    }
    write_table(path, "rollouts", [row])
    assert_same(read_table(path, "rollouts"), [row])


def test_row_groups_are_one_table(tmp_path) -> None:
    rows = [scored_row(length, 2, number) for number, length in enumerate([3, 0, 1, 5, 2])]
    with open_table(tmp_path / "t.parquet", "scored") as write_rows:
        for part in (rows[:2], [], rows[2:3], rows[3:]):
            write_rows(part)
    assert_same(read_table(tmp_path / "t.parquet", "scored"), rows)


def test_a_row_cut_out_of_a_table_owns_no_other_row_s_numbers(tmp_path) -> None:
    """Rows that were read, some of them left out, are written and read again."""
    rows = [scored_row(number + 1, 2, number) for number in range(4)]
    write_table(tmp_path / "a.parquet", "scored", rows)
    write_table(tmp_path / "b.parquet", "scored", read_table(tmp_path / "a.parquet", "scored")[1:3])
    assert_same(read_table(tmp_path / "b.parquet", "scored"), rows[1:3])


@pytest.mark.parametrize("column", ["teacher_logprobs", "topk_ids"])
def test_a_slice_of_a_larger_column_is_read_from_its_own_place(tmp_path, column: str) -> None:
    """Its offsets do not begin at 0."""
    rows = [scored_row(number + 1, 2, number) for number in range(5)]
    write_table(tmp_path / "t.parquet", "scored", rows)
    part = pq.read_table(tmp_path / "t.parquet").column(column).chunk(0).slice(1, 3)
    assert part.offsets[0].as_py() > 0
    for found, row in zip(_values(part), rows[1:4], strict=True):
        np.testing.assert_array_equal(found, row[column])


def test_rows_of_one_table_have_the_same_k(tmp_path) -> None:
    with pytest.raises(AssertionError, match="same K"):
        write_table(tmp_path / "t.parquet", "scored", [scored_row(2, 2), scored_row(2, 3)])


def test_metadata_comes_back(tmp_path) -> None:
    write_table(tmp_path / "t.parquet", "scored", [scored_row(2, 1)], {"template_id": "sha256:é"})
    assert read_metadata(tmp_path / "t.parquet") == {"template_id": "sha256:é"}
    write_table(tmp_path / "u.parquet", "scored", [scored_row(2, 1)])
    assert read_metadata(tmp_path / "u.parquet") == {}


def test_the_same_rows_give_the_same_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / name, "scored", [scored_row(2, 3)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_table_is_refused_by_name(tmp_path) -> None:
    write_table(tmp_path / "t.parquet", "scored", [scored_row(2, 3)])
    with pytest.raises(ValueError, match="does not hold the columns of a rollouts table"):
        read_table(tmp_path / "t.parquet", "rollouts")


def test_prompts_are_read_by_row_across_row_groups(tmp_path) -> None:
    table = pa.table({"prompt_id": [f"p{i}" for i in range(10)], "token_ids": [[i] * (i + 1) for i in range(10)]})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=3)
    table_read = PromptTable(tmp_path / "p.parquet")
    found = table_read.rows([9, 0, 4, 4])
    expected = [("p9", [9] * 10), ("p0", [0]), ("p4", [4] * 5), ("p4", [4] * 5)]
    assert [(row["prompt_id"], row["token_ids"].tolist()) for row in found] == expected
    assert table_read.rows([]) == []


def test_prompt_ids_may_be_plain_lists(tmp_path) -> None:
    """The rows of ``prepare`` come from a tokenizer."""
    rows = [
        {"prompt_id": "a", "line": 1, "text": "x", "token_ids": [5, 6]},
        {"prompt_id": "b", "line": 2, "text": "", "token_ids": []},
    ]
    write_table(tmp_path / "t.parquet", "prompts", rows)
    assert [row["token_ids"].tolist() for row in read_table(tmp_path / "t.parquet", "prompts")] == [[5, 6], []]


@pytest.mark.slow
def test_a_million_tokens_with_their_top_eight_take_seconds(tmp_path) -> None:
    """As Python lists they take a minute and gigabytes."""
    rows = [scored_row(1000, 8, number) for number in range(1000)]
    begun = time.monotonic()
    write_table(tmp_path / "t.parquet", "scored", rows)
    found = read_table(tmp_path / "t.parquet", "scored")
    assert time.monotonic() - begun < 30
    assert_same(found[::100], rows[::100])
