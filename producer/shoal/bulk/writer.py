"""Outcomes into output and error file, in input order, and durable at intervals.

Rows end in any order; a row is written when all before it are. Owns that order and when files are
synced; the manifest is saved after the data it speaks of.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from shoal.bulk.append_file import AppendFile, is_disk_full
from shoal.bulk.line_format import LineFormat
from shoal.bulk.output import Extent, Output
from shoal.bulk.resume import Written
from shoal.bulk.rows import FailedRow, InputRow, Place, error_line
from shoal.wire import GenerationResult

SYNC_INTERVAL_S = 5.0
MAX_PENDING_BYTES = 16 * 1024 * 1024  # Written sooner than that interval if it is so much.

Outcome = tuple[InputRow, GenerationResult] | FailedRow


class OrderedWriter:
    """Writes the outcome of row after row.

    Args:
        errors: the error file; what `written` does not speak of is cut off it, and off the output,
            when the writer opens.
        written: counts and digest, carried on from an earlier run.
        on_sync: called when everything written so far is durable.
    """

    def __init__(
        self,
        output: Output,
        line_format: LineFormat,
        errors: Path,
        written: Written,
        on_sync: Callable[[], None],
    ) -> None:
        self.written = written
        self._output = output
        self._line_format = line_format
        self._errors = AppendFile(errors)
        self._on_sync = on_sync
        self._waiting: dict[int, Outcome] = {}
        self._record: list[Outcome] = []
        self._synced_s = 0.0
        self._is_dirty = True

    def __enter__(self) -> Self:
        self._errors.open(self.written.error_bytes)
        self._output.open(Extent(self.written.lines, self.written.line_bytes))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.sync()
        except OSError as error:
            # What there is no room for is generated again when the run goes on.
            if not is_disk_full(error):
                raise
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
        while (following := self._waiting.pop(self._next_position, None)) is not None:
            self._record.append(following)
            if len(self._record) == _place(following).num_parts:
                self._write(self._record)
                self._record = []

    def sync_if_due(self, now_s: float) -> None:
        """Make what is written durable, if the last time is long enough ago, or if it is much."""
        is_much = self._output.num_pending_bytes > MAX_PENDING_BYTES
        if is_much or now_s - self._synced_s >= SYNC_INTERVAL_S:
            self.sync()
            self._synced_s = now_s

    def sync(self) -> None:
        """Make what is written durable, now.

        Raises:
            OSError: there is no room; nothing is lost, and it can be tried again.
        """
        if not self._is_dirty:
            return
        self._errors.sync()
        self._output.sync()
        self._on_sync()
        self._is_dirty = False

    def finish(self) -> None:
        """All rows are written: make the output what it is to be. Can be tried again as `sync`."""
        self.sync()
        self._output.finish()

    @property
    def _next_position(self) -> int:
        return self.written.positions + len(self._record)

    def _write(self, record: list[Outcome]) -> None:
        """A record, all its prompts together; one that failed fails it."""
        self._is_dirty = True
        failed = next((one for one in record if isinstance(one, FailedRow)), None)
        if failed is not None:
            line = error_line(failed)
            self._errors.append(line)
            self.written.count_error(line, len(record), is_skipped=failed.is_skipped)
            return
        lines = self._line_format.lines([one for one in record if not isinstance(one, FailedRow)])
        self._output.append(lines.stored)
        self.written.count(lines, len(record))


def _place(outcome: Outcome) -> Place:
    return outcome.place if isinstance(outcome, FailedRow) else outcome[0].place
