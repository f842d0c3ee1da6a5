"""The tables between the stages: Prompt -> Rollout -> Scored -> Selection, and their Parquet schemas (docs/data.md).

A row of the middle three is keyed by (prompt_id, sample_index), never by its position.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def _schemas() -> dict[str, pa.Schema]:
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
                ("tail_mass", floats),
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schemas()[kind].with_metadata(dict(metadata or {}))
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")


@contextlib.contextmanager
def open_table(path: Path, kind: str) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """A table that is written batch by batch, for more rows than fit memory; each call appends a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schemas()[kind]
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield lambda rows: writer.write_table(pa.Table.from_pylist(list(rows), schema=schema))


def read_table(path: Path, kind: str) -> list[dict[str, Any]]:
    """Read the rows back as dictionaries, in the order they were written. Raises ValueError on another schema."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    if not table.schema.equals(_schemas()[kind]):
        raise ValueError(f"{path} does not hold the columns of a {kind} table: {table.schema.names}")
    return table.to_pylist()


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a table, as given to ``write_table``."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items() if not key.startswith(b"ARROW:")}


def read_prompts(path: Path, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The prompts at those rows, in that order. Reads only the row groups that hold them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    wanted = np.asarray(rows)
    group = np.searchsorted(starts, wanted, side="right") - 1
    needed = sorted(set(group.tolist()))
    table = file.read_row_groups(needed, columns=["prompt_id", "token_ids"])
    offset = dict(zip(needed, np.cumsum([0, *(sizes[g] for g in needed)]), strict=False))
    index = [int(offset[g] + row - starts[g]) for g, row in zip(group.tolist(), rows, strict=True)]
    return table.take(pa.array(index)).to_pylist()
