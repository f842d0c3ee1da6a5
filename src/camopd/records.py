"""The tables between the stages: Prompt -> Rollout -> Scored -> Selection, and their Parquet schemas (docs/data.md).

A row of the middle three is keyed by (prompt_id, sample_index), never by its position. Token ids are int32 and
log-probabilities float32 numpy arrays, (L,) or (L, K) for L tokens of a response.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def schemas() -> dict[str, pa.Schema]:
    """The columns of each kind of table."""
    import pyarrow as pa

    ids, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    key = [("prompt_id", pa.string()), ("sample_index", pa.int32()), ("branch", pa.string()), ("step", pa.int32())]
    return {
        "prompts": pa.schema([("prompt_id", pa.string()), ("line", pa.int32()), ("text", pa.string()), ("token_ids", ids)]),
        "rollouts": pa.schema(
            [
                *key,
                ("prompt_ids", ids),
                ("response_ids", ids),
                ("logprobs", floats),
                ("topk_ids", pa.list_(ids)),
                ("student_topk_logprobs", pa.list_(floats)),
                ("entropy", pa.float32()),
                ("finish_reason", pa.string()),
                ("text", pa.string()),
            ]
        ),
        "scored": pa.schema(
            [
                *key,
                ("teacher_logprobs", floats),
                ("topk_ids", pa.list_(ids)),
                ("topk_logprobs", pa.list_(floats)),
            ]
        ),
        "selection": pa.schema(
            [
                *key,
                ("num_tokens", pa.int32()),
                ("score", pa.float64()),
                ("rank", pa.int32()),
                ("cumulative_share", pa.float64()),
                ("kept", pa.bool_()),
                ("reason", pa.string()),
            ]
        ),
        "samples": pa.schema(
            [
                *((name, pa.string()) for name in ("model", "task", "item", "question", "prompt", "answer", "target")),
                ("score", pa.float64()),
            ]
        ),
    }


def write_table(path: Path, kind: str, rows: Iterable[Mapping[str, Any]], metadata: Mapping[str, str] | None = None) -> None:
    """Write rows under the schema ``kind``. The bytes depend on the rows and the pyarrow version alone."""
    import pyarrow.parquet as pq

    schema = schemas()[kind].with_metadata(dict(metadata or {}))
    pq.write_table(_table(list(rows), schema), path, compression="zstd")


def _table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    columns = [_column([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
    """An array of the values, lists of numbers from numpy arrays laid end to end: a round's top-k has millions of them."""
    import numpy as np
    import pyarrow as pa

    if not pa.types.is_list(type_):
        return pa.array(values, type_)
    item = type_.value_type
    offsets = pa.array(np.cumsum([0, *(len(value) for value in values)]), pa.int32())  # refuses what int32 cannot count
    if pa.types.is_list(item):  # (L, K) arrays, K the same in all rows
        width = values[0].shape[1] if values else 0
        assert all(value.shape[1] == width for value in values), "the rows of one table have the same K"
        flat = _flat([value.reshape(-1) for value in values], item.value_type)
        inner_offsets = pa.array(np.arange(offsets[-1].as_py() + 1) * width, pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.ListArray.from_arrays(inner_offsets, flat, type=item), type=type_)
    return pa.ListArray.from_arrays(offsets, _flat(values, item), type=type_)


def _flat(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
    import numpy as np
    import pyarrow as pa

    return pa.array(np.concatenate([np.asarray(value) for value in values]) if values else [], type_)


@contextlib.contextmanager
def open_table(path: Path, kind: str) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """A table that is written batch by batch, for more rows than fit memory; each call appends a row group."""
    import pyarrow.parquet as pq

    schema = schemas()[kind]
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield lambda rows: writer.write_table(_table(rows, schema))


def read_table(path: Path, kind: str) -> list[dict[str, Any]]:
    """Read the rows back as dictionaries, in the order they were written, lists of numbers as numpy arrays.

    Raises:
        ValueError: another schema.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    if not table.schema.equals(schemas()[kind]):
        raise ValueError(f"{path} does not hold the columns of a {kind} table: {table.schema.names}")
    return _rows(table)


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    columns = [_values(table.column(name).combine_chunks()) for name in table.schema.names]
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.Array) -> list[Any]:
    """Python values, or views into one numpy array where each value is a list of numbers (L,) or of lists (L, K)."""
    import numpy as np
    import pyarrow as pa

    if not pa.types.is_list(column.type):
        return column.to_pylist()
    edges = column.offsets.to_numpy()
    flat = column.flatten()
    if pa.types.is_list(flat.type):
        width = len(flat.flatten()) // len(flat) if len(flat) else 0
        numbers = flat.flatten().to_numpy(zero_copy_only=False).reshape(len(flat), width)
    else:
        numbers = flat.to_numpy(zero_copy_only=False)
    return np.split(numbers, edges[1:-1] - edges[0]) if len(column) else []


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a table, as given to ``write_table``."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items() if not key.startswith(b"ARROW:")}


class PromptTable:
    """Prompts of a table, read once and kept as Arrow arrays, four bytes a token: a round asks for rows from everywhere."""

    def __init__(self, path: Path) -> None:
        import numpy as np
        import pyarrow.parquet as pq

        batches = pq.read_table(path, columns=["prompt_id", "token_ids"]).to_batches()
        self._ids = [batch["prompt_id"] for batch in batches]
        self._edges = [batch["token_ids"].offsets.to_numpy() for batch in batches]
        self._tokens = [batch["token_ids"].values.to_numpy() for batch in batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()

    def rows(self, wanted: Sequence[int]) -> list[dict[str, Any]]:
        """The prompts at those rows, in that order; token ids are views."""
        found = []
        for row in wanted:
            part = bisect_right(self._starts, row) - 1
            place = row - self._starts[part]
            begin, end = self._edges[part][place : place + 2]
            found.append({"prompt_id": self._ids[part][place].as_py(), "token_ids": self._tokens[part][begin:end]})
        return found
