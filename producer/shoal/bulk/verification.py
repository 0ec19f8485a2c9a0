"""Rows of an output made again, and compared: the proof that they follow from the run alone.

Owns which records are checked and the order of things. Each row is bound to the kind of workers
that made it. Nothing of a verification stays in Redis.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from shoal.bulk.comparison import Difference, first_difference
from shoal.bulk.flat import flat_rows
from shoal.bulk.job_names import new_run_id
from shoal.bulk.outputs import WrittenRecord
from shoal.bulk.packing import PendingRow, job_sequences
from shoal.bulk.plan import Workers
from shoal.bulk.rows import InputRow
from shoal.bulk.window import MAX_IN_FLIGHT, WINDOW_OF_SLOTS, Window, take_back
from shoal.client import Client
from shoal.errors import ShoalError
from shoal.wire import GenerationResult

MAX_ATTEMPTS = 2
MAX_SHOWN = 20
POLL_S = 0.5

Ending = Literal["complete", "interrupted", "timed out"]


@dataclass(slots=True)
class Findings:
    """What a verification has found so far.

    Attributes:
        checked, differing, failed: records; a failed one could not be made again.
        differences: the first in each of the first records that differ.
        errors: how often each reason was given for a failed one.
    """

    checked: int = 0
    differing: int = 0
    failed: int = 0
    differences: list[Difference] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, differences: list[Difference]) -> None:
        """Count a record that was made again."""
        self.checked += 1
        self.differing += bool(differences)
        if differences and len(self.differences) < MAX_SHOWN:
            self.differences.append(differences[0])


@dataclass(slots=True)
class _Checked:
    """A record that is being made again: what is still to come of its prompts."""

    record: WrittenRecord
    results: dict[int, GenerationResult] = field(default_factory=dict)


class Verification:
    """Makes records again and compares them.

    Args:
        records: what to check, in order.
        mixed: whether any kind of worker may make them again.
    """

    def __init__(self, records: Iterable[WrittenRecord], *, mixed: bool = False) -> None:
        self.findings = Findings()
        self.fingerprint: str | None = None
        self._records = iter(records)
        self._mixed = mixed
        self._parts: dict[int, tuple[_Checked, int]] = {}
        self._position = 0
        self._is_read = False

    def run(
        self,
        client: Client,
        queue: str,
        *,
        num_records: int,
        stop: Callable[[], bool],
        on_turn: Callable[[], None],
        model: str | None = None,
        workers: Callable[[], Workers] = Workers,
        timeout_s: float | None = None,
    ) -> Ending:
        """Check all records, until `stop` says so or the time is up.

        Args:
            num_records: about how many there are; how full jobs are follows from it.
        """
        run_id, started_s = new_run_id(), time.monotonic()
        window = Window(client, queue, run_id, model=model)
        try:
            while not (self._is_read and window.is_empty):
                if stop():
                    return "interrupted"
                if timeout_s is not None and time.monotonic() - started_s >= timeout_s:
                    return "timed out"
                window.max_in_flight = max(MAX_IN_FLIGHT, WINDOW_OF_SLOTS * workers().num_slots)
                window.job_sequences = job_sequences(num_records, window.max_in_flight)
                self._turn(window)
                on_turn()
            return "complete"
        finally:
            with suppress(ShoalError):
                take_back(client, queue, run_id)

    def _turn(self, window: Window) -> None:
        can_send = not window.is_sent or (window.room > 0 and not self._is_read)
        for pending, result in window.collect(0.0 if can_send else POLL_S):
            error = result.error
            if error is not None and error.retryable and pending.attempts < MAX_ATTEMPTS:
                window.add_again([pending], alone=True)
            else:
                self._take_in(pending, result)
        window.forget(self._position)
        for fingerprint, rows in groupby(self._read(window.room), key=self._bound_to):
            window.fingerprint = self.fingerprint = fingerprint
            pending_rows = list(rows)
            window.add(pending_rows, pending_rows[-1].position + 1)
        window.send()

    def _read(self, room: int) -> Iterator[PendingRow]:
        while room > 0:
            record = next(self._records, None)
            if record is None:
                self._is_read = True
                return
            checked = _Checked(record)
            for part, row in enumerate(record.rows):
                pending = PendingRow(self._position, row)
                self._parts[self._position] = (checked, part)
                self._position += 1
                room -= pending.num_sequences
                yield pending

    def _bound_to(self, pending: PendingRow) -> str | None:
        checked, _part = self._parts[pending.position]
        made_by: str | None = checked.record.flats[0].get("fingerprint")
        return None if self._mixed else made_by

    def _take_in(self, pending: PendingRow, result: GenerationResult) -> None:
        checked, part = self._parts.pop(pending.position)
        checked.results[part] = result
        if len(checked.results) == len(checked.record.rows):
            self._compare(checked)

    def _compare(self, checked: _Checked) -> None:
        record = checked.record
        answered = [(row, checked.results[part]) for part, row in enumerate(record.rows)]
        error = next((one.error for _row, one in answered if one.error is not None), None)
        if error is not None:
            self.findings.failed += 1
            self.findings.errors[error.message] += 1
            return
        self.findings.add(list(_differences(record, answered)))


def sample_of(
    records: Iterable[WrittenRecord], number: int, seed: int | None
) -> list[WrittenRecord]:
    """So many of the records, any as likely as any other, in order; all if there are fewer.

    Source: Waterman's reservoir sampling, in Knuth, The Art of Computer Programming, 3.4.2, R.
    """
    # Which rows are looked at is no secret.
    chance = random.Random(seed)  # noqa: S311
    reservoir: list[tuple[int, WrittenRecord]] = []
    for place, record in enumerate(records):
        if place < number:
            reservoir.append((place, record))
        elif (drawn := chance.randrange(place + 1)) < number:
            reservoir[drawn] = (place, record)
    return [record for _place, record in sorted(reservoir, key=lambda pair: pair[0])]


def _differences(
    record: WrittenRecord, answered: list[tuple[InputRow, GenerationResult]]
) -> Iterator[Difference]:
    made = [
        flat for row, result in answered for flat in flat_rows(row, result, with_token_ids=True)
    ]
    for old, new in zip(record.flats, made, strict=True):
        if difference := first_difference(old, new):
            yield difference
