"""One input record as a request or as the error that it is; one result as flat output rows.

Owns which fields a record may have, the columns of the output and their canonical bytes. It knows
no file and no queue.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.bulk.seeds import row_seed
from shoal.errors import InvalidRequest
from shoal.validation import parse
from shoal.wire import (
    MAX_METADATA_LEVELS,
    GenerationRequest,
    GenerationResult,
    ResultError,
    SamplingParams,
    nests_within,
)

COLUMNS = (
    "index",
    "sample",
    "id",
    "prompt",
    "text",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "seed",
    "model",
    "fingerprint",
    "metadata",
)
OWN_FIELDS = frozenset({"prompt", "id", "metadata"})  # All others are of SamplingParams.
MAX_LINE_LEVELS = MAX_METADATA_LEVELS + 2  # Metadata in a record, in a line of an error file.
ERROR_LINE_FIELDS = frozenset({"index", "input", "error"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands: its index among the input's records, and its line, from 1."""

    index: int
    line: int
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class InputRow:
    """A record that can be generated from.

    Attributes:
        source: the record as it was read, for the error line if there is one.
    """

    place: Place
    id: str
    request: GenerationRequest
    source: Mapping[str, Any]
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A record without a completion: broken as it stood, or answered with an error."""

    place: Place
    id: str
    source: Mapping[str, Any] | str
    error: ResultError


@dataclass(frozen=True, slots=True)
class RowDefaults:
    """What every row of a run has unless it says otherwise.

    Attributes:
        seed: the run's; a row's own follows from it and the row's index.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


def row_from_line(text: str, place: Place, defaults: RowDefaults) -> InputRow | FailedRow:
    """A line of JSON as a row; a line of an error file stands for the record it holds."""
    try:
        record = _record(text)
        if record.keys() >= ERROR_LINE_FIELDS and "prompt" not in record:
            return _row_from_error_line(record, place, defaults)
    except InvalidRequest as error:
        return failed_row(place, str(place.index), text, error)
    return row_from_record(record, place, defaults)


def row_from_record(
    record: Mapping[str, Any], place: Place, defaults: RowDefaults, row_id: str | None = None
) -> InputRow | FailedRow:
    """A record as a row: `prompt`, and perhaps `id`, `metadata` and sampling fields."""
    given_id = record.get("id")
    if given_id is None:
        given_id = row_id or str(place.index)
    # Whole numbers are the ids of many data sets; a boolean is an int only to Python.
    if isinstance(given_id, int) and not isinstance(given_id, bool):
        given_id = str(given_id)
    try:
        return _valid_row({**record, "id": given_id}, place, defaults, source=record)
    except InvalidRequest as error:
        return failed_row(place, str(given_id), record, error)


def failed_row(
    place: Place, row_id: str, source: Mapping[str, Any] | str, error: InvalidRequest
) -> FailedRow:
    """A row that cannot be generated from, and why."""
    result_error = ResultError(code="invalid_request", message=str(error))
    return FailedRow(place, row_id, source, result_error)


def error_line(row: FailedRow) -> bytes:
    """A failed row as a line of the error file, which is itself a valid input."""
    record = {
        "index": row.place.index,
        "id": row.id,
        "line": row.place.line,
        "input": row.source,
        "error": row.error.model_dump(mode="json"),
        "attempts": row.place.attempts,
    }
    # In ASCII: what made a row fail may be text that UTF-8 cannot hold.
    return json.dumps(record).encode() + b"\n"


def output_lines(row: InputRow, result: GenerationResult) -> list[bytes]:
    """A result as canonical lines, one a completion: every column, in order, in compact JSON."""
    return [
        json.dumps(flat, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n"
        for flat in flat_rows(row, result)
    ]


def flat_rows(row: InputRow, result: GenerationResult) -> Iterator[dict[str, Any]]:
    """A result as rows of `COLUMNS`, one a completion."""
    prompt = row.request.prompt
    for completion in result.completions:
        values = (
            row.place.index,
            completion.index,
            row.id,
            prompt if isinstance(prompt, str) else json.dumps(prompt),
            completion.text,
            completion.finish_reason,
            result.usage.prompt_tokens,
            len(completion.token_ids),
            row.request.sampling.seed,
            result.model,
            result.fingerprint,
            json.dumps(row.metadata, ensure_ascii=False),
        )
        yield dict(zip(COLUMNS, values, strict=True))


def _valid_row(
    record: Mapping[str, Any], place: Place, defaults: RowDefaults, *, source: Mapping[str, Any]
) -> InputRow:
    fields = {key: value for key, value in record.items() if key not in OWN_FIELDS}
    metadata = record.get("metadata")
    if not isinstance(metadata, dict | None):
        raise InvalidRequest(f"metadata is a {type(metadata).__name__}; give an object")
    prompt = record.get("prompt")
    if prompt is None:
        raise InvalidRequest("prompt is missing")
    if not isinstance(prompt, str | list):
        raise InvalidRequest(f"prompt is a {type(prompt).__name__}; give text or token ids")
    sampling = {**defaults.sampling, **fields}
    if sampling.get("seed") is None:
        sampling["seed"] = row_seed(defaults.seed, place.index)
    request = parse(
        GenerationRequest,
        {
            "prompt": prompt,
            "id": record["id"],
            "sampling": parse(SamplingParams, sampling),
            "service_class": "bulk",
        },
    )
    # Metadata stays here: the worker would only carry it back and forth.
    return InputRow(place, record["id"], request, source, metadata or {})


def _row_from_error_line(
    record: Mapping[str, Any], place: Place, defaults: RowDefaults
) -> InputRow | FailedRow:
    """The failed record again, with the index it had: so its id and seed are the same too."""
    index, attempts, row_id = record["index"], record.get("attempts"), record.get("id")
    again = Place(
        index=index if isinstance(index, int) else place.index,
        line=place.line,
        attempts=attempts if isinstance(attempts, int) else 0,
    )
    source = record["input"]
    row_id = row_id if isinstance(row_id, str) and row_id else str(again.index)
    if isinstance(source, str):
        try:
            source = _record(source)
        except InvalidRequest as error:
            return failed_row(again, row_id, record["input"], error)
    if not isinstance(source, dict):
        kind = type(source).__name__
        return failed_row(again, row_id, json.dumps(source), InvalidRequest(f"input is a {kind}"))
    return row_from_record(source, again, defaults, row_id)


def _record(text: str) -> dict[str, Any]:
    """A line as a JSON object whose text can be written as UTF-8."""
    try:
        record = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the line is not valid JSON: {error}") from None
    if not nests_within(record, MAX_LINE_LEVELS):
        raise InvalidRequest(f"the line nests deeper than {MAX_LINE_LEVELS} levels")
    if not isinstance(record, dict):
        raise InvalidRequest(
            f"the line is a JSON {type(record).__name__}; give an object such as "
            '{"prompt": "Once upon a time"}'
        )
    if "\\u" in text:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidRequest(
                "the line holds half of a surrogate pair, which no text has"
            ) from None
    return record


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    """A number that JSON can say again: 1e999 would be read as infinity and written as none."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(
            f"{text[:20]} is too large a number; the limit is {sys.float_info.max:.1e}"
        )
    return number
