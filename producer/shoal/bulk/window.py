"""Requests in flight: packed into jobs, bounded in number, taken in as they end.

Owns the jobs of one run in Redis, from submission until they are read and deleted. Order is not
kept here; that is the writer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.bulk.outcomes import results_of
from shoal.bulk.rows import InputRow
from shoal.client import Client
from shoal.jobs import MAX_PACK_REQUESTS, Handle
from shoal.wire import GenerationRequest, GenerationResult

# Read at once when they end; what a killed run leaves behind goes after an hour.
RESULT_TTL_S = 3_600
MAX_IN_FLIGHT = 1_024


@dataclass(slots=True)
class Slot:
    """One row under way: its position in the input, and how often it was sent."""

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
    ) -> None:
        self.max_in_flight = max_in_flight
        self._client = client
        self._requests_per_job = requests_per_job
        self._queue = queue
        self._model = model
        self._jobs: dict[str, list[Slot]] = {}
        self._num_in_flight = 0

    @property
    def room(self) -> int:
        """Sequences that may still be sent."""
        return max(0, self.max_in_flight - self._num_in_flight)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way."""
        return not self._jobs

    def submit(self, slots: Sequence[Slot], *, alone: bool = False) -> None:
        """Send these rows, packed, or `alone`: so that one bad row cannot fail its job again."""
        if not slots:
            return
        jobs = self._client.submit_many(
            [self._request(slot) for slot in slots],
            queue=self._queue,
            result_ttl=RESULT_TTL_S,
            requests_per_job=1 if alone else self._requests_per_job,
        )
        for slot, job in zip(slots, jobs, strict=True):
            slot.attempts += 1
            self._jobs.setdefault(job.handle.job_id, []).append(slot)
            self._num_in_flight += slot.num_sequences

    def collect(self, timeout_s: float) -> list[tuple[Slot, GenerationResult]]:
        """The results of the jobs that have ended; waits for the first, `timeout_s` at the most."""
        if not self._jobs:
            return []
        ended = self._client.ended(list(self._jobs), timeout_s)
        results: list[tuple[Slot, GenerationResult]] = []
        for job_id, state in ended.items():
            slots = self._jobs[job_id]
            ids = [slot.row.id for slot in slots]
            results += zip(slots, results_of(state, job_id, ids), strict=True)
        # A failed job stays for whoever looks into failures; the others have said all they know.
        read = [job_id for job_id, state in ended.items() if state.status != "failed"]
        self._client.forget(read, self._queue)
        for job_id in ended:
            self._num_in_flight -= sum(slot.num_sequences for slot in self._jobs.pop(job_id))
        return results

    def cancel(self) -> None:
        """Take back everything under way, and leave nothing of it in Redis."""
        for job_id in self._jobs:
            self._client.cancel(Handle(job_id))
        self._client.forget(list(self._jobs), self._queue)
        self._jobs.clear()
        self._num_in_flight = 0

    def _request(self, slot: Slot) -> GenerationRequest:
        request = slot.row.request
        return request.model_copy(update={"model": self._model}) if self._model else request
