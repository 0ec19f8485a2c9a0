"""One bulk run: from what an earlier run left, through the window, to the manifest.

Owns the order of things and when a run ends. It knows no terminal: how it goes is told to a
callable once a turn, which may also raise to end the run; whatever ends it, its state is saved.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from shoal.bulk.append_file import is_disk_full
from shoal.bulk.folder import RunFolder
from shoal.bulk.opening import Opened, open_run, open_with_input, stock_of
from shoal.bulk.packing import PendingRow, job_sequences
from shoal.bulk.plan import Limits, Plan, Progress, Received, Workers
from shoal.bulk.rows import FailedRow, InputRow, refused_row
from shoal.bulk.window import WINDOW_OF_SLOTS, Window, take_back
from shoal.bulk.writer import OrderedWriter
from shoal.client import Client
from shoal.errors import QueueFull, RedisUnavailable, ShoalError
from shoal.wire import GenerationResult

MAX_ATTEMPTS = 2
MAX_WAITING_ROWS = 8_192  # Rows that ended before an earlier one; beyond it nothing new is sent.
MAX_WAITING_TOKENS = 4_000_000  # Of these rows; about 40 bytes each.
MAX_KEPT_SEQUENCES = 8_192  # Ended ones still in Redis; beyond it, what they say is synced early.
MAX_READ_ROWS = 1_024  # In one turn, so that a file of broken rows cannot keep a signal waiting.
MAX_OUTAGE_S = 60.0
POLL_S = 0.5
NUM_EXAMPLES = 3

Ending = Literal["complete", "interrupted", "timed out", "too many failures"]


class BulkRun:
    """A run under its folder's lock. `begin` looks; nothing is written before `generate`.

    Attributes:
        examples: a few rows with their results, to show.
        fingerprints: the kinds of workers that have answered since this start.
        is_disk_full: whether nothing can be written for now, and so nothing is sent.
        num_truncated: prompts that were cut at their start since this start, as the plan allows.
        rows_saved: rows whose outcome is durable.
    """

    def __init__(self, plan: Plan, opened: Opened) -> None:
        self.plan = plan
        self.folder = RunFolder(plan.output)
        self.manifest = opened.manifest
        self.rows_total = opened.rows_total
        self.is_disk_full = False
        self.num_truncated = 0
        self.examples: list[tuple[InputRow, GenerationResult]] = []
        self.fingerprints: set[str] = set()
        self._replaced = opened.replaced
        self._output, self._line_format = opened.output, opened.line_format
        self._written = opened.written
        self._before = replace(opened.written)
        self._rows = enumerate(opened.rows, start=opened.written.positions)
        self.rows_saved = opened.written.rows
        self._again: list[PendingRow] = []
        self._anew: list[PendingRow] = []
        self._is_read = False
        self._end = self._durable_positions = opened.written.positions
        self._received = Received()
        self._started_s = self._contact_s = time.monotonic()
        self._ended_s: float | None = None

    @classmethod
    @contextlib.contextmanager
    def locked(cls, plan: Plan) -> Iterator[BulkRun]:
        """`begin` under the lock of the output's folder, which is held within.

        Raises:
            OutputLocked: another run has it. InvalidRequest: as `begin`.
        """
        with RunFolder(plan.output).locked():
            yield cls(*open_with_input(plan))

    @classmethod
    def begin(cls, plan: Plan) -> BulkRun:
        """Read the input once, and what an earlier run has written of it.

        Raises:
            InvalidRequest: the output belongs to another run, or to none.
        """
        return cls(plan, open_run(plan))

    @property
    def has_rows_left(self) -> bool:
        """Whether there is anything to generate."""
        return self._written.rows < self.rows_total

    @property
    def model(self) -> str | None:
        """The model that the run is bound to, as it was named now or when the run began."""
        return self.manifest.parameters.model

    @property
    def fingerprint(self) -> str | None:
        """The kind of workers that the run is bound to; None: any, or the first one's to say."""
        return None if self.plan.mixed else self.manifest.fingerprint

    @property
    def rows_before(self) -> int:
        """Rows that an earlier run has written."""
        return self._before.rows

    def progress(self) -> Progress:
        """How far the run has come."""
        written, before = self._written, self._before
        return Progress(
            rows_total=self.rows_total,
            rows_done=written.rows,
            rows_failed=written.rows_failed,
            rows_before=before.rows,
            prompt_tokens=written.prompt_tokens - before.prompt_tokens,
            completion_tokens=written.completion_tokens - before.completion_tokens,
            elapsed_s=(self._ended_s or time.monotonic()) - self._started_s,
            tokens_received=self._received.tokens,
            completions_received=self._received.completions,
            num_at_limit=self._received.at_limit,
            jobs_lost=self._received.jobs_lost,
        )

    def finish(self) -> None:
        """End a run that has no rows left: for the first time, if it was not complete before."""
        was_complete = self.manifest.complete
        self._take_stock(complete=True)
        if not was_complete:
            with self._writer() as writer:
                writer.finish()  # Whatever is behind the last whole row was cut off.
            self._save(complete=True)

    def generate(
        self,
        client: Client,
        queue: str,
        limits: Limits,
        *,
        stop: Callable[[], bool],
        on_turn: Callable[[Progress], None],
        model: str | None = None,
        workers: Callable[[], Workers] = Workers,
    ) -> Ending:
        """Generate the rows that are left, until `stop` says so or a limit is reached.

        Args:
            model: asked for in each request; None takes whatever the worker serves.
            workers: who makes the rows, asked each turn: with more of them more is in flight.

        Raises:
            RedisUnavailable, QueueFull: for longer than `MAX_OUTAGE_S`. Whatever `on_turn` raises.
        """
        run_id = self.manifest.run_id
        window = Window(client, queue, run_id, model=model, fingerprint=self.fingerprint)
        self._started_s = self._contact_s = time.monotonic()
        with self._writer() as writer:
            self._save()
            if self._replaced is not None:
                take_back(client, queue, self._replaced)
            window.find(self._end)
            try:
                while (ending := self._ending(limits, stop)) is None:
                    self._resize(window, limits, workers())
                    self._turn_or_wait(window, writer, on_turn)
                    self._sync_if_due(window, writer)
            finally:
                self._ended_s = time.monotonic()
                with contextlib.suppress(ShoalError):
                    window.leave(takes_all=workers().are_own)
        if not self.is_disk_full and ending != "complete":
            self._save()
        window.forget(self._durable_positions)
        return ending

    def _writer(self) -> OrderedWriter:
        return OrderedWriter(
            self._output, self._line_format, self.folder.errors, self._written, self._save
        )

    def _sync_if_due(self, window: Window, writer: OrderedWriter) -> None:
        """Write what is due, and all of it at the end; on a full disk, try again in a while."""
        if self.is_disk_full:
            time.sleep(POLL_S)
        with self._room_awaited():
            if self._is_read and self._is_answered(window) and not writer.num_waiting:
                writer.finish()
                self._save(complete=True)
            elif self.is_disk_full or window.num_kept > MAX_KEPT_SEQUENCES:
                writer.sync()
            else:
                writer.sync_if_due(time.monotonic())

    @contextlib.contextmanager
    def _room_awaited(self) -> Iterator[None]:
        """Note a full disk, which is no error: somebody makes room, or stops the run."""
        try:
            yield
        except OSError as error:
            if not is_disk_full(error):
                raise
            self.is_disk_full = True
        else:
            self.is_disk_full = False

    def _ending(self, limits: Limits, stop: Callable[[], bool]) -> Ending | None:
        if stop():
            return "interrupted"
        if not limits.max_failures.allows(self._written.rows_failed, self.rows_total):
            return "too many failures"
        if self.manifest.complete:
            return "complete"
        elapsed_s = time.monotonic() - self._started_s
        if limits.timeout_s is not None and elapsed_s >= limits.timeout_s:
            return "timed out"
        return None

    def _resize(self, window: Window, limits: Limits, workers: Workers) -> None:
        """Fit window and jobs to the workers there are and to the rows that are left."""
        window.max_in_flight = max(limits.max_in_flight, WINDOW_OF_SLOTS * workers.num_slots)
        num_left = self.rows_total - self._written.rows
        window.job_sequences = job_sequences(num_left, window.max_in_flight)

    def _is_answered(self, window: Window) -> bool:
        return window.is_empty and not self._again and not self._anew

    def _turn_or_wait(
        self, window: Window, writer: OrderedWriter, on_turn: Callable[[Progress], None]
    ) -> None:
        """A turn; if Redis is away or full for now, a pause instead."""
        try:
            self._turn(window, writer)
            on_turn(self.progress())
            self._contact_s = time.monotonic()
        except (RedisUnavailable, QueueFull) as error:
            if time.monotonic() - self._contact_s > MAX_OUTAGE_S:
                raise
            if isinstance(error, QueueFull):
                # What has come is here; it would be made again, should this process be killed now.
                window.forget(self._end)
            time.sleep(POLL_S)

    def _turn(self, window: Window, writer: OrderedWriter) -> None:
        """Take in what has ended, and send what there is room for."""
        room = self._room(window, writer)
        has_rows = self._again or self._anew or (room > 0 and not self._is_read)
        can_send = has_rows or not window.is_sent
        # Taken in first: with Redis full, only that makes room for what is to be sent.
        for row, result in window.collect(0.0 if can_send else POLL_S):
            self._contact_s = time.monotonic()
            self._take_in(row, result, writer)
        self._received.jobs_lost = window.num_lost
        window.forget(self._durable_positions)
        window.fingerprint = self.fingerprint
        # Rows for another attempt go first and whatever the room: the writer waits for them.
        window.add_again(self._again, alone=True)
        self._again.clear()
        window.add_again(self._anew)
        self._anew.clear()
        window.add(self._read(self._room(window, writer), writer), self._end)
        window.send()

    def _room(self, window: Window, writer: OrderedWriter) -> int:
        """Sequences that may be read and sent now; none while nothing can be written."""
        written = self._written.completion_tokens - self._before.completion_tokens
        if self.is_disk_full or self._received.tokens - written > MAX_WAITING_TOKENS:
            return 0
        return max(0, min(window.room, MAX_WAITING_ROWS - writer.num_waiting))

    def _read(self, room: int, writer: OrderedWriter) -> list[PendingRow]:
        """Rows of so many sequences; broken ones are answered here."""
        fresh: list[PendingRow] = []
        for _ in range(MAX_READ_ROWS):
            if room <= 0:
                break
            position, row = next(self._rows, (None, None))
            if position is None or row is None:
                self._is_read = True
                break
            self._end = position + 1
            if isinstance(row, FailedRow):
                writer.put(position, row)
            else:
                fresh.append(PendingRow(position, row))
                room -= fresh[-1].num_sequences
        return fresh

    def _take_in(
        self, pending: PendingRow, result: GenerationResult, writer: OrderedWriter
    ) -> None:
        error = result.error
        if error is not None and error.retryable and pending.attempts < MAX_ATTEMPTS:
            self._again.append(pending)
        elif error is None and self._is_of_other_kind(result) and pending.attempts <= MAX_ATTEMPTS:
            self._anew.append(pending)
        else:
            writer.put(pending.position, self._outcome(pending, result))

    def _is_of_other_kind(self, result: GenerationResult) -> bool:
        """Whether it was sent before the run was bound, and answered by another kind of worker."""
        return self.fingerprint not in {None, result.fingerprint}

    def _outcome(
        self, pending: PendingRow, result: GenerationResult
    ) -> tuple[InputRow, Any] | FailedRow:
        row = pending.row
        if result.error is not None:
            skips_long = self.plan.on_long == "skip"
            return refused_row(row, result.error, pending.attempts, skips_long=skips_long)
        self._received.add(result)
        self.num_truncated += result.truncated_tokens > 0
        self.fingerprints.add(result.fingerprint)
        self.manifest.fingerprint = self.manifest.fingerprint or result.fingerprint
        self.manifest.model = self.manifest.model or result.model
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append((row, result))
        return row, result

    def _save(self, *, complete: bool = False) -> None:
        self._take_stock(complete=complete)
        self.manifest.save(self.folder.manifest)
        self.rows_saved = self._written.rows
        self._durable_positions = self._written.positions

    def _take_stock(self, *, complete: bool) -> None:
        stock = stock_of(self._written, self._output, complete=complete)
        self.manifest = self.manifest.model_copy(update=stock)
