"""CSV and Parquet files as records, one at a time, and only their columns that are wanted."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shoal.bulk.fields import Fields, Kind
from shoal.bulk.streams import MAX_LINE_BYTES, opened
from shoal.errors import InvalidRequest

BATCH_ROWS = 1_024
_NOT_UTF8 = "surrogateescape"


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its line in the file (its row, where a file has none) and its values.

    Attributes:
        fault: why its values are not to be trusted.
    """

    line: int
    values: Mapping[str, Any]
    fault: str | None = None


def csv_header(path: Path) -> list[str]:
    """The columns of a CSV file.

    Raises:
        InvalidRequest: there is no header line, or a name stands in it twice.
    """
    with opened(path) as file:
        return _header(path, _csv_rows(file))


def csv_records(path: Path, wanted: Sequence[str]) -> Iterator[Record]:
    """The records of a CSV file with a header line (RFC 4180, commas); every value is text."""
    with opened(path) as file:
        rows = _csv_rows(file)
        header = _header(path, rows)
        places = {name: header.index(name) for name in wanted if name in header}
        for line, row, fault in rows:
            values = {name: _shown(row[at]) for name, at in places.items() if at < len(row)}
            yield Record(line, values, fault or _fault(row, len(header)))


def count_csv(path: Path) -> int:
    """How many records a CSV file has."""
    with opened(path) as file:
        return max(0, sum(1 for _ in _csv_rows(file)) - 1)


def parquet_columns(path: Path) -> dict[str, Kind]:
    """The columns of a Parquet file, with the type that each has when it is kept."""
    with _parquet(path) as file:
        return {field.name: _kind(field.type) for field in file.schema_arrow}


def parquet_records(path: Path, wanted: Sequence[str]) -> Iterator[Record]:
    """The records of a Parquet file."""
    with _parquet(path) as file:
        columns = [name for name in file.schema_arrow.names if name in wanted]
        number = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            for values in batch.to_pylist() if columns else [{}] * batch.num_rows:
                number += 1
                yield Record(number, values)


def count_parquet(path: Path) -> int:
    """How many records a Parquet file has."""
    with _parquet(path) as file:
        return int(file.metadata.num_rows)


def require_columns(path: Path, columns: Sequence[str], fields: Fields) -> None:
    """Raises InvalidRequest that names what there is if a column that is needed is not there."""
    missing = [name for name in fields.names() if name not in columns]
    if missing:
        hint = "" if fields.are_given else ": name the prompt's column with --prompt-column"
        raise InvalidRequest(
            f"{path} has no column {missing[0]!r} (it has: {', '.join(columns)}){hint}"
        )


def _csv_rows(file: BinaryIO) -> Iterator[tuple[int, list[str], str | None]]:
    """Line number, values and fault of each row that is not blank."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(_csv_lines(file), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, [], f"the row is not valid CSV: {error}"
            continue
        if row:
            yield line, row, None


def _csv_lines(file: BinaryIO) -> Iterator[str]:
    is_first = True
    while content := file.readline(MAX_LINE_BYTES):
        text = content.decode("utf-8-sig" if is_first else "utf-8", _NOT_UTF8)
        is_first = False
        yield text


def _header(path: Path, rows: Iterator[tuple[int, list[str], str | None]]) -> list[str]:
    _line, header, fault = next(rows, (0, [], "it is empty"))
    if fault is not None:
        raise InvalidRequest(f"{path} has no header line: {fault}")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise InvalidRequest(f"{path} has two columns named {twice[0]!r}; rename one")
    return header


def _fault(row: list[str], num_columns: int) -> str | None:
    if len(row) != num_columns:
        return f"the row has {len(row)} fields; the header names {num_columns}"
    return "the row is not UTF-8" if any(map(_is_broken, row)) else None


def _is_broken(text: str) -> bool:
    return not text.isprintable() and any("\udc80" <= one <= "\udcff" for one in text)


def _shown(text: str) -> str:
    if not _is_broken(text):
        return text
    return text.encode(errors=_NOT_UTF8).decode(errors="backslashreplace")


def _parquet(path: Path) -> Any:
    # Imported here: most runs have no use for it, and it takes a while.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidRequest(f"{path} is not readable as Parquet: {error}") from None


def _kind(column_type: Any) -> Kind:
    import pyarrow as pa  # noqa: PLC0415

    if pa.types.is_boolean(column_type):
        return "bool"
    if pa.types.is_integer(column_type) and column_type != pa.uint64():
        return "int64"
    return "double" if pa.types.is_floating(column_type) else "string"
