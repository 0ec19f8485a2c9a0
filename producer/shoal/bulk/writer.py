"""Outcomes into files, in input order, and durable at intervals.

Rows end in any order; a row is written when all before it are. Owns the two files (completions and
errors) and when they are synced; the manifest is saved after the data it speaks of.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from shoal.bulk.resume import Written
from shoal.bulk.rows import FailedRow, InputRow, error_line, output_lines
from shoal.wire import GenerationResult

SYNC_INTERVAL_S = 5.0

Outcome = tuple[InputRow, GenerationResult] | FailedRow


class OrderedWriter:
    """Writes the outcome of row after row.

    Args:
        output, errors: what `written` does not speak of is cut off when the writer opens.
        written: counts and digest, carried on from an earlier run.
        on_sync: called when everything written so far is durable.

    Attributes:
        num_waiting: outcomes that wait for an earlier row's.
    """

    def __init__(
        self, output: Path, errors: Path, written: Written, on_sync: Callable[[], None]
    ) -> None:
        self.written = written
        self._paths = (output, errors)
        self._on_sync = on_sync
        self._waiting: dict[int, Outcome] = {}
        self._synced_s = 0.0
        self._is_dirty = True

    def __enter__(self) -> Self:
        output, errors = self._paths
        self._output = _opened_at(output, self.written.output_bytes)
        self._errors = _opened_at(errors, self.written.error_bytes)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.sync()
        finally:
            self._output.close()
            self._errors.close()

    @property
    def num_waiting(self) -> int:
        """Outcomes that wait for an earlier row's."""
        return len(self._waiting)

    def put(self, position: int, outcome: Outcome) -> None:
        """Take the outcome of the row at this position of the input; write what can be written."""
        self._waiting[position] = outcome
        while (following := self._waiting.pop(self.written.rows, None)) is not None:
            self._write(following)

    def sync_if_due(self, now_s: float) -> None:
        """Make what is written durable, if the last time is long enough ago."""
        if now_s - self._synced_s >= SYNC_INTERVAL_S:
            self._synced_s = now_s
            self.sync()

    def sync(self) -> None:
        """Make what is written durable, now."""
        if not self._is_dirty:
            return
        for file in (self._output, self._errors):
            file.flush()
            os.fsync(file.fileno())
        self._is_dirty = False
        self._on_sync()

    def _write(self, outcome: Outcome) -> None:
        written = self.written
        self._is_dirty = True
        if isinstance(outcome, FailedRow):
            written.error_bytes += self._errors.write(error_line(outcome))
            written.rows_failed += 1
        else:
            row, result = outcome
            content = b"".join(output_lines(row, result))
            written.output_bytes += self._output.write(content)
            written.sha256.update(content)
            written.completions += len(result.completions)
            written.prompt_tokens += result.usage.prompt_tokens
            written.completion_tokens += result.usage.completion_tokens
        written.rows += 1


def _opened_at(path: Path, num_bytes: int) -> BinaryIO:
    file = path.open("ab")
    if file.tell() != num_bytes:
        file.truncate(num_bytes)
    return file
