"""Input files as rows, one at a time: memory does not grow with the file.

Owns the formats and which of them a file has. What a record means is in `records`, `tables` and
`openai_batch`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shoal.bulk import openai_batch
from shoal.bulk.fields import Fields, Kind, kinds_of, template_names
from shoal.bulk.records import (
    is_error_line,
    json_record,
    record_within,
    row_from_line,
    row_from_record,
)
from shoal.bulk.rows import Place, Row, RowDefaults, failed_row
from shoal.bulk.streams import COMPRESSIONS, Line, lines, opened, shown, text_of
from shoal.bulk.tables import (
    Record,
    count_csv,
    count_parquet,
    csv_header,
    csv_records,
    parquet_columns,
    parquet_records,
    require_columns,
)
from shoal.errors import InvalidRequest

Format = Literal["txt", "jsonl", "openai-batch", "csv", "parquet"]
TEXT_SUFFIXES = (".txt", ".jsonl", ".csv")
INPUTS = "inputs are .txt, .jsonl, .csv (each also .gz or .zst) and .parquet files"


@dataclass(frozen=True, slots=True)
class Survey:
    """What a look through an input tells: its digest, how many records it has, kept types."""

    sha256: str
    num_rows: int
    kinds: Mapping[str, Kind] = field(default_factory=dict)


def check_input(path: Path) -> None:
    """Raises InvalidRequest if this is no input that a run could read."""
    if str(path) == "-":
        return
    if path.is_dir():
        raise InvalidRequest(f"{path} is a folder; {INPUTS}")
    suffix = _bare(path).suffix
    if suffix not in (*TEXT_SUFFIXES, ".parquet") or (suffix == ".parquet" != path.suffix):
        raise InvalidRequest(f"{path} ends in {path.suffix!r}; {INPUTS}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None


def input_format(path: Path) -> Format:
    """What a file holds: by its suffix, and OpenAI's batch lines by their first line."""
    suffix = _bare(path).suffix
    if suffix == ".jsonl":
        return "openai-batch" if _begins_a_batch(path) else "jsonl"
    return "parquet" if suffix == ".parquet" else "csv" if suffix == ".csv" else "txt"


def survey(path: Path, fields: Fields = Fields()) -> Survey:  # noqa: B008
    """Digest and count, without parsing more than it takes; the types of columns to be kept.

    Raises:
        InvalidRequest: the fields are not those of this input.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    match input_format(path):
        case "parquet":
            columns = parquet_columns(path)
            require_columns(path, list(columns), fields)
            kinds = {name: columns[name] for name in fields.keep}
            return Survey(sha256, count_parquet(path), kinds)
        case "csv":
            require_columns(path, csv_header(path), fields)
            return Survey(sha256, count_csv(path), dict.fromkeys(fields.keep, "string"))
        case "jsonl":
            kinds = kinds_of(_records(path), fields.keep) if fields.keep else {}
        case found:
            _require_defaults(path, found, fields)
            kinds = {}
    with opened(path) as content:
        return Survey(sha256, sum(1 for _ in lines(content)), kinds)


def read_rows(path: Path, defaults: RowDefaults, limit: int | None = None) -> Iterator[Row]:
    """The rows of the first `limit` records, in order; blank lines are none."""
    wanted = (*defaults.fields.names(), defaults.fields.id or "id")
    match input_format(path):
        case "csv":
            yield from _table_rows(csv_records(path, wanted), defaults, limit)
        case "parquet":
            yield from _table_rows(parquet_records(path, wanted), defaults, limit)
        case found:
            with opened(path) as file:
                for index, line in enumerate(lines(file)):
                    if limit is not None and index >= limit:
                        return
                    yield from _line_rows(line, Place(index, line.number), defaults, found)


def _line_rows(line: Line, place: Place, defaults: RowDefaults, found: Format) -> Iterator[Row]:
    try:
        text = text_of(line)
    except InvalidRequest as error:
        yield failed_row(place, str(place.index), shown(line), error)
        return
    if found == "txt":
        yield row_from_record({"prompt": text}, place, defaults)
    elif found == "jsonl":
        yield row_from_line(text, place, defaults)
    else:
        yield from openai_batch.rows_from_line(text, place, defaults)


def _table_rows(
    records: Iterator[Record], defaults: RowDefaults, limit: int | None
) -> Iterator[Row]:
    for index, record in enumerate(records):
        if limit is not None and index >= limit:
            return
        place = Place(index, record.line)
        if record.fault is not None:
            error = InvalidRequest(record.fault)
            yield failed_row(place, str(index), record.values, error)
        else:
            yield _table_row(record, place, defaults)


def _table_row(record: Record, place: Place, defaults: RowDefaults) -> Row:
    values = dict(record.values)
    row_id = values.pop(defaults.fields.id or "id", None)
    # Whatever type a column of ids has: dates, UUIDs and floats are ids as well.
    if row_id is not None and row_id != "":
        values[defaults.fields.id or "id"] = str(row_id)
    return row_from_record(values, place, defaults)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects among a file's lines."""
    with opened(path) as file:
        for line in lines(file):
            try:
                record: Any = json_record(text_of(line))
            except InvalidRequest:
                continue
            if is_error_line(record):
                record = record_within(record)
            if isinstance(record, dict):
                yield record


def _begins_a_batch(path: Path) -> bool:
    return any(openai_batch.is_batch_record(record) for record in _first(_records(path)))


def _first(records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
        return [record for record, _ in zip(records, range(1), strict=False)]
    finally:
        records.close()  # type: ignore[attr-defined]


def _require_defaults(path: Path, found: str, fields: Fields) -> None:
    if found == "txt" and fields == Fields(template=fields.template):
        names = set(template_names(fields.template)) if fields.template else set()
        if names - {"prompt"}:
            raise InvalidRequest(f"{path} is text: its lines are {{prompt}} in a --template")
    elif fields.are_given:
        what = "is text" if found == "txt" else "holds OpenAI batch lines"
        raise InvalidRequest(f"{path} {what} and has no columns to choose from")


def _bare(path: Path) -> Path:
    """The path without the suffix of its compression."""
    return path.with_suffix("") if path.suffix in COMPRESSIONS else path
