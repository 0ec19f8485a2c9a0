"""One JSON record as a row: which fields it may have, and what is wrong with it in words."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from shoal.bulk.fields import kept_value
from shoal.bulk.rows import SKIPPED, FailedRow, InputRow, Place, Row, RowDefaults, failed_row
from shoal.bulk.seeds import row_seed
from shoal.errors import InvalidRequest
from shoal.validation import parse
from shoal.wire import (
    MAX_METADATA_LEVELS,
    MAX_PROMPT_BYTES,
    GenerationRequest,
    ResultError,
    SamplingParams,
    nests_within,
)

OWN_FIELDS = frozenset({"prompt", "id", "metadata"})  # All others are of SamplingParams.
MAX_LINE_LEVELS = MAX_METADATA_LEVELS + 2  # Metadata in a record, in a line of an error file.
ERROR_LINE_FIELDS = frozenset({"index", "input", "error"})


def row_from_line(text: str, place: Place, defaults: RowDefaults) -> Row:
    """A line of JSON as a row; a line of an error file stands for the record it holds."""
    try:
        record = json_record(text)
    except InvalidRequest as error:
        return failed_row(place, str(place.index), text, error)
    if is_error_line(record):
        again, row_id = earlier_place(record, place)
        source = record_within(record)
        if isinstance(source, InvalidRequest):
            return failed_row(again, row_id, as_source(record["input"]), source)
        return row_from_record(source, again, defaults, row_id)
    return row_from_record(record, place, defaults)


def row_from_record(
    record: Mapping[str, Any], place: Place, defaults: RowDefaults, row_id: str | None = None
) -> Row:
    """A record as a row: a prompt, and perhaps an id, `metadata` and sampling fields."""
    given_id = record.get(defaults.fields.id or "id")
    if given_id is None:
        given_id = row_id or str(place.index)
    # Whole numbers are the ids of many data sets; a boolean is an int only to Python.
    if isinstance(given_id, int) and not isinstance(given_id, bool):
        given_id = str(given_id)
    try:
        return _valid_row(record, given_id, place, defaults)
    except InvalidRequest as error:
        return failed_row(place, str(given_id), record, error)


def is_error_line(record: Mapping[str, Any]) -> bool:
    """Whether a record is a line of an error file rather than a request."""
    return record.keys() >= ERROR_LINE_FIELDS and "prompt" not in record


def earlier_place(record: Mapping[str, Any], place: Place) -> tuple[Place, str]:
    """The place and id that the record of an error line had: so its seed is the same too."""
    index, attempts, row_id = record["index"], record.get("attempts"), record.get("id")
    again = Place(
        index=index if isinstance(index, int) else place.index,
        line=place.line,
        attempts=attempts if isinstance(attempts, int) else 0,
    )
    return again, row_id if isinstance(row_id, str) and row_id else str(again.index)


def record_within(record: Mapping[str, Any]) -> dict[str, Any] | InvalidRequest:
    """The record that an error line holds, or why it is none."""
    source = record["input"]
    if isinstance(source, str):
        try:
            return json_record(source)
        except InvalidRequest as error:
            return error
    if not isinstance(source, dict):
        return InvalidRequest(f"input is a {type(source).__name__}")
    return source


def as_source(value: object) -> str:
    """What stood in an error line's `input`, as text."""
    return value if isinstance(value, str) else json.dumps(value)


def json_record(text: str) -> dict[str, Any]:
    """A line as a JSON object whose text can be written as UTF-8.

    Raises:
        InvalidRequest: it is none.
    """
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


def _valid_row(record: Mapping[str, Any], row_id: Any, place: Place, defaults: RowDefaults) -> Row:
    fields = defaults.fields
    kept = {name: kept_value(record.get(name), kind) for name, kind in defaults.kinds.items()}
    metadata, own = record.get("metadata"), {}
    if fields.are_default:
        others = {*OWN_FIELDS, *fields.keep, fields.id}
        own = {key: value for key, value in record.items() if key not in others}
    else:
        metadata = None  # A data set's columns mean what they mean there.
    if not isinstance(metadata, dict | None):
        raise InvalidRequest(f"metadata is a {type(metadata).__name__}; give an object")
    prompt = checked_prompt(fields.prompt_of(record), fields.prompt or "prompt", defaults)
    if defaults.skip_long and isinstance(prompt, str) and is_long(prompt):
        text = f"the prompt is over {MAX_PROMPT_BYTES} bytes"
        return FailedRow(place, str(row_id), record, ResultError(code=SKIPPED, message=text))
    sampling = {**defaults.sampling, **own}
    if sampling.get("seed") is None:
        sampling["seed"] = row_seed(defaults.seed, place.index)
    request = parse(
        GenerationRequest,
        {
            "prompt": prompt,
            "id": row_id,
            "sampling": parse(SamplingParams, sampling),
            "service_class": "bulk",
            "on_long": defaults.on_long,
        },
    )
    # Metadata stays here: the worker would only carry it back and forth.
    return InputRow(place, row_id, request, record, metadata or {}, kept)


def checked_prompt(prompt: object, name: str, defaults: RowDefaults) -> str | list[Any]:
    """A prompt that is at least of the right type, cut to what can be sent where that is wanted.

    Raises:
        InvalidRequest: it is not.
    """
    if prompt is None:
        raise InvalidRequest(f"{name} is missing")
    if not isinstance(prompt, str | list):
        raise InvalidRequest(f"{name} is a {type(prompt).__name__}; give text or token ids")
    if defaults.on_long == "truncate-left" and isinstance(prompt, str) and is_long(prompt):
        return prompt.encode()[-MAX_PROMPT_BYTES:].decode(errors="ignore")
    return prompt


def is_long(prompt: str) -> bool:
    """Whether a prompt is too long to be sent at all; the length in tokens is the worker's."""
    return len(prompt) > MAX_PROMPT_BYTES // 4 and len(prompt.encode()) > MAX_PROMPT_BYTES


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
