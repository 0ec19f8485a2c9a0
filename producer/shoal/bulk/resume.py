"""Which rows an earlier run has written: the input joined with the output, from the start.

Counting lines would not do: a row may have several completions or an error line, and a crash may
tear either file anywhere. So each input row is looked for where it must be, and the first one that
is not there whole is where the run goes on. Only reads.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from shoal.bulk.line_format import Key, LineFormat, Lines
from shoal.bulk.output import Output, whole_lines
from shoal.bulk.rows import SKIPPED, InputRow, Row


@dataclass(slots=True)
class Written:
    """What stays of an earlier run, or has been written since.

    Attributes:
        rows: records of the input that have an outcome; positions: their prompts, of which a batch
            line may have several.
        rows_failed, rows_skipped: those of them in the error file.
        lines, line_bytes: of the output, uncompressed; error_bytes: of the error file.
        fingerprint: of the worker that made the first completion.
        sha256: over the canonical rows.
    """

    rows: int = 0
    positions: int = 0
    rows_failed: int = 0
    rows_skipped: int = 0
    completions: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lines: int = 0
    line_bytes: int = 0
    error_bytes: int = 0
    fingerprint: str | None = None
    sha256: Any = field(default_factory=hashlib.sha256)

    def count(self, lines: Lines, num_prompts: int) -> None:
        """A record with completions."""
        self.rows += 1
        self.positions += num_prompts
        self.completions += len(lines.canonical)
        self.prompt_tokens += lines.prompt_tokens
        self.completion_tokens += lines.completion_tokens
        self.lines += len(lines.stored)
        self.line_bytes += sum(map(len, lines.stored))
        self.fingerprint = self.fingerprint or lines.fingerprint
        for line in lines.canonical:
            self.sha256.update(line)

    def count_error(self, line: bytes, num_prompts: int, *, is_skipped: bool) -> None:
        """A record with an error line."""
        self.rows += 1
        self.positions += num_prompts
        self.rows_skipped += is_skipped
        self.rows_failed += not is_skipped
        self.error_bytes += len(line)


def join(
    rows: Iterable[Row], output: Output, line_format: LineFormat, errors: Path
) -> tuple[Written, Iterator[Row]]:
    """What of these rows is written, and the rows that are left to do."""
    written = Written()
    rest = iter(rows)
    completions = _Records(output.stored(), line_format.key)
    failures = _Records(_lines_of(errors), _error_key)
    while record := _next_record(rest):
        if found := _answer(record, completions, line_format):
            written.count(found, len(record))
        elif error := failures.take([(record[0].place.index, record[0].id)]):
            ((line, stored),) = error
            is_skipped = _code(stored) == SKIPPED
            written.count_error(line, len(record), is_skipped=is_skipped)
        else:
            return written, chain(record, rest)
    return written, iter(())


def written_records(
    rows: Iterable[Row], output: Output, line_format: LineFormat
) -> Iterator[tuple[list[InputRow], Lines]]:
    """The records that the output answers, in order; those with an error line are left out."""
    rest = iter(rows)
    completions = _Records(output.stored(), line_format.key)
    while record := _next_record(rest):
        if found := _answer(record, completions, line_format):
            yield [row for row in record if isinstance(row, InputRow)], found


def _next_record(rows: Iterator[Row]) -> list[Row]:
    """The rows of the next record, all its prompts; none at the end."""
    record: list[Row] = []
    for row in rows:
        record.append(row)
        if len(record) == row.place.num_parts:
            break
    return record


def _answer(record: list[Row], completions: _Records, line_format: LineFormat) -> Lines | None:
    prompts = [row for row in record if isinstance(row, InputRow)]
    if not prompts:
        return None
    stored = completions.take(line_format.keys(prompts))
    return line_format.found(prompts, stored) if stored else None


def _error_key(record: Mapping[str, Any]) -> Key:
    return (record.get("index"), record.get("id"))


def _code(record: Mapping[str, Any]) -> object:
    error = record.get("error")
    return error.get("code") if isinstance(error, dict) else None


class _Records:
    """Stored lines, taken from the front if they are the ones expected."""

    def __init__(self, lines: Iterator[bytes], key: Callable[[Mapping[str, Any]], Key]) -> None:
        self._lines = lines
        self._key = key
        self._ahead: deque[tuple[bytes, dict[str, Any]]] = deque()

    def take(self, keys: list[Key]) -> list[tuple[bytes, dict[str, Any]]]:
        """The next lines, if they have these keys; else none, and they stay."""
        while len(self._ahead) < len(keys):
            following = next(self._lines, None)
            if following is None:
                return []
            self._ahead.append((following, json.loads(following)))
        for key, (_line, record) in zip(keys, self._ahead, strict=False):
            if key != self._key(record):
                return []
        return [self._ahead.popleft() for _ in keys]


def _lines_of(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from whole_lines(file)
