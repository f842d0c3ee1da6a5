import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from camopd.records import read_metadata, read_prompts, read_table, write_table

ROW = {"prompt_id": "a", "sample_index": 0, "branch": "general", "step": 3}


def test_a_table_comes_back_as_it_was_written(tmp_path) -> None:
    rows = [
        ROW
        | {
            "teacher_logprobs": [-0.5, -1.0],
            "topk_ids": [[1, 2], [3, 4]],
            "topk_logprobs": [[-0.5, -1.5]] * 2,
            "tail_mass": [0.25, 0.5],
        }
    ]
    write_table(tmp_path / "t.parquet", "scored", rows, {"template_id": "x"})
    assert read_table(tmp_path / "t.parquet", "scored") == rows
    assert read_metadata(tmp_path / "t.parquet") == {"template_id": "x"}


def test_the_same_rows_give_the_same_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / name, "scored", [ROW])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_table_is_refused_by_name(tmp_path) -> None:
    write_table(tmp_path / "t.parquet", "scored", [ROW])
    with pytest.raises(ValueError, match="does not hold the columns of a rollouts table"):
        read_table(tmp_path / "t.parquet", "rollouts")


def test_prompts_are_read_by_row_across_row_groups(tmp_path) -> None:
    table = pa.table({"prompt_id": [f"p{i}" for i in range(10)], "token_ids": [[i] for i in range(10)]})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=3)
    found = read_prompts(tmp_path / "p.parquet", [9, 0, 4, 4])
    assert [(row["prompt_id"], row["token_ids"]) for row in found] == [("p9", [9]), ("p0", [0]), ("p4", [4]), ("p4", [4])]
