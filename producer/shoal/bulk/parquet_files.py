"""Parquet files of flat rows: their schema, and lines into them and out of them again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from shoal.bulk.fields import COLUMNS, TOKEN_IDS, Kind
from shoal.bulk.flat import canonical_line

GROUP_ROWS = 10_000  # Rows of a row group, and of what is in memory while a shard is made.
_NUMBERS = {
    "index": "int64",
    "seed": "int64",
    "sample": "int32",
    "prompt_tokens": "int32",
    "completion_tokens": "int32",
}


class Schema:
    """The columns of a run's rows, with their types."""

    def __init__(self, kinds: Mapping[str, Kind], *, with_token_ids: bool) -> None:
        self._kinds = kinds
        self._with_token_ids = with_token_ids

    def arrow(self) -> Any:
        """The same as pyarrow has it."""
        import pyarrow as pa  # noqa: PLC0415

        types = {
            "string": pa.string(),
            "int32": pa.int32(),
            "int64": pa.int64(),
            "double": pa.float64(),
            "bool": pa.bool_(),
        }
        kinds = {name: _NUMBERS.get(name, "string") for name in COLUMNS} | dict(self._kinds)
        columns = [(name, types[kind]) for name, kind in kinds.items()]
        if self._with_token_ids:
            columns.append((TOKEN_IDS, pa.list_(pa.int32())))
        return pa.schema(columns)


def parquet_lines(path: Path) -> Iterator[bytes]:
    """The rows of a file of ours as canonical lines."""
    import pyarrow.parquet as pq  # noqa: PLC0415

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(GROUP_ROWS):
            for row in batch.to_pylist():
                yield canonical_line(row)


def num_rows(path: Path) -> int:
    """How many rows a Parquet file has."""
    import pyarrow.parquet as pq  # noqa: PLC0415

    return int(pq.read_metadata(path).num_rows)


def write_parquet(path: Path, schema: Schema, lines: Iterable[bytes]) -> None:
    """Write lines as a Parquet file, a bounded number in memory."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    arrow = schema.arrow()
    with pq.ParquetWriter(path, arrow, compression="zstd") as writer:
        rest = iter(lines)
        while group := [json.loads(line) for line in islice(rest, GROUP_ROWS)]:
            writer.write_table(pa.Table.from_pylist(group, schema=arrow))


def join_parquet(path: Path, schema: Schema, sources: Sequence[Path]) -> None:
    """Write the rows of several files as one, in row groups of one size."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    arrow = schema.arrow()
    files = [pq.ParquetFile(source) for source in sources]
    batches = chain.from_iterable(file.iter_batches(GROUP_ROWS) for file in files)
    with pq.ParquetWriter(path, arrow, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(pa.Table.from_batches([batch], schema=arrow))
    for file in files:
        file.close()
