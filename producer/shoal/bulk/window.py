"""Requests in flight: packed into jobs, bounded in number, taken in as they end.

Owns the jobs of one run in Redis, from submission until they are read and deleted. Order is not
kept here; that is the writer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from shoal.bulk.outcomes import results_of
from shoal.bulk.rows import InputRow
from shoal.client import Client
from shoal.errors import ShoalError
from shoal.jobs import MAX_PACK_REQUESTS, Handle, OutgoingJob
from shoal.submission import packed_jobs
from shoal.wire import GenerationRequest, GenerationResult

# Read at once when they end; what a killed run leaves behind goes after an hour.
RESULT_TTL_S = 3_600
MAX_IN_FLIGHT = 1_024


@dataclass(slots=True)
class PendingRow:
    """One row without an outcome: its position in the input, and how often it was submitted."""

    position: int
    row: InputRow
    attempts: int = 0

    @property
    def num_sequences(self) -> int:
        """How much of the window it fills."""
        return self.row.request.sampling.n


class Window:
    """The jobs of one run that have not ended.

    Args:
        model: asked for in each request; None takes whatever the worker serves.
        fingerprint: the kind of workers that jobs added from now on are bound to; None: any.

    Attributes:
        max_in_flight: sequences at the most, but for one row of many samples.
    """

    def __init__(
        self,
        client: Client,
        queue: str,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        requests_per_job: int = MAX_PACK_REQUESTS,
        model: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.max_in_flight = max_in_flight
        self.fingerprint = fingerprint
        self._client = client
        self._requests_per_job = requests_per_job
        self._queue = queue
        self._model = model
        self._jobs: dict[str, list[PendingRow]] = {}
        self._unsent: dict[str, OutgoingJob] = {}
        self._read: list[str] = []
        self._num_in_flight = 0

    @property
    def room(self) -> int:
        """Sequences that may still be added."""
        return max(0, self.max_in_flight - self._num_in_flight)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way."""
        return not self._jobs

    @property
    def is_sent(self) -> bool:
        """Whether nothing waits for being sent."""
        return not self._unsent

    def add(self, rows: Sequence[PendingRow], *, alone: bool = False) -> None:
        """Take these rows in, packed, or `alone`: so that a bad one cannot fail its job again."""
        if not rows:
            return
        following = iter(rows)
        for job in packed_jobs(
            [self._request(row) for row in rows],
            queue=self._queue,
            result_ttl_s=RESULT_TTL_S,
            requests_per_job=1 if alone else self._requests_per_job,
            fingerprint=self.fingerprint,
        ):
            self._unsent[job.job_id] = job
            self._jobs[job.job_id] = [next(following) for _ in job.requests]
        for row in rows:
            row.attempts += 1
            self._num_in_flight += row.num_sequences

    def send(self) -> None:
        """Send what was added. After an error the same jobs go again, under the same ids.

        Some may be in Redis already: a reply can be lost, and Redis can run full half-way.
        """
        if self._unsent:
            self._client.send(list(self._unsent.values()))
            self._unsent.clear()

    def collect(self, timeout_s: float) -> list[tuple[PendingRow, GenerationResult]]:
        """The results of the jobs that have ended; waits for the first, `timeout_s` at the most."""
        if not self._jobs:
            return []
        results: list[tuple[PendingRow, GenerationResult]] = []
        for job_id, state in self._client.ended(list(self._jobs), timeout_s).items():
            if state.status is None and job_id in self._unsent:
                continue  # Not gone: not there yet.
            rows = self._jobs.pop(job_id)
            self._unsent.pop(job_id, None)
            self._num_in_flight -= sum(row.num_sequences for row in rows)
            ids = [row.row.id for row in rows]
            results += zip(rows, results_of(state, job_id, ids), strict=True)
            # A failed job stays for whoever looks into failures; the others have said all.
            if state.status != "failed":
                self._read.append(job_id)
        return results

    def forget(self) -> None:
        """Delete jobs whose results were handed out; if Redis is away, another time."""
        with suppress(ShoalError):
            self._client.forget(self._read, self._queue)
            self._read.clear()

    def cancel(self) -> None:
        """Take back everything under way, and leave nothing of it in Redis."""
        for job_id in self._jobs:
            self._client.cancel(Handle(job_id))
        self._client.forget([*self._jobs, *self._read], self._queue)
        self._jobs.clear()
        self._unsent.clear()
        self._read.clear()
        self._num_in_flight = 0

    def _request(self, row: PendingRow) -> GenerationRequest:
        request = row.row.request
        if self._model is None or request.model is not None:
            return request  # A batch line may name the model that it is for.
        return request.model_copy(update={"model": self._model})
