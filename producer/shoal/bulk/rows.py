"""What an input record becomes: a row that can be generated from, or the error that it is.

Owns these types and the line of the error file. It knows no file and no queue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shoal.bulk.fields import Fields, Kind
from shoal.errors import InvalidRequest
from shoal.wire import GenerationRequest, OnLong, ResultError

SKIPPED = "skipped"  # The code of a row that was left out because the user wants it so.


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands: its index among the input's records, and its line, from 1.

    Attributes:
        attempts: how often it was sent before.
        part, num_parts: a record may hold several prompts, each a row with the same index.
    """

    index: int
    line: int
    attempts: int = 0
    part: int = 0
    num_parts: int = 1


@dataclass(frozen=True, slots=True)
class InputRow:
    """A prompt that can be generated from.

    Attributes:
        source: the record as it was read, for the error line if there is one.
        kept: the columns that each row of the output repeats.
    """

    place: Place
    id: str
    request: GenerationRequest
    source: Mapping[str, Any]
    metadata: Mapping[str, Any]
    kept: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A row without a completion: broken as it stood, or answered with an error."""

    place: Place
    id: str
    source: Mapping[str, Any] | str
    error: ResultError

    @property
    def is_skipped(self) -> bool:
        """Whether it was left out on purpose, and so has not failed."""
        return self.error.code == SKIPPED


Row = InputRow | FailedRow


@dataclass(frozen=True, slots=True)
class RowDefaults:
    """What every row of a run has unless it says otherwise, and how records are read.

    Attributes:
        seed: the run's; a row's own follows from it and the row's index.
        kinds: the types of the kept columns.
        on_long: what the worker does with a prompt that does not fit.
        skip_long: whether such a row is left out rather than failed.
        ignore_model: whether the models that batch lines name are not asked for.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    fields: Fields = field(default_factory=Fields)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    on_long: OnLong = "error"
    skip_long: bool = False
    ignore_model: bool = False


def failed_row(
    place: Place, row_id: str, source: Mapping[str, Any] | str, error: InvalidRequest
) -> FailedRow:
    """A row that cannot be generated from, and why."""
    result_error = ResultError(code="invalid_request", message=str(error))
    return FailedRow(place, row_id, source, result_error)


def refused_row(row: InputRow, error: ResultError, attempts: int, *, skips_long: bool) -> FailedRow:
    """A row that was answered with an error, after so many attempts of this run."""
    if error.code == "prompt_too_long" and skips_long:
        error = error.model_copy(update={"code": SKIPPED})
    if error.code == "model_mismatch" and row.request.model is not None:
        text = f"{error.message}; --ignore-model takes whatever is served"
        error = error.model_copy(update={"message": text})
    place = replace(row.place, attempts=row.place.attempts + attempts)
    return FailedRow(place, row.id, row.source, error)


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
    return json.dumps(record, default=str).encode() + b"\n"
