"""Requests in flight: packed into jobs, bounded in number, taken in as they end.

Owns the jobs of one run in Redis, from submission until what they say is durable here. Order is not
kept here; that is the writer's.

A job is deleted only when its rows are durable, so a producer that is killed finds finished results
again, and what runs goes on. One that leaves takes back what no worker has begun and leaves the
rest: it is nearly done, and it goes by itself a day later if nobody comes back for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from shoal.bulk.found_jobs import FoundJobs
from shoal.bulk.job_names import JobName, jobs_key
from shoal.bulk.outcomes import lost_result, results_of
from shoal.bulk.packing import PendingRow, pack_rows
from shoal.client import Client
from shoal.errors import ShoalError
from shoal.job_states import JobState, ListedJob
from shoal.jobs import Handle, OutgoingJob, outgoing_job
from shoal.wire import GenerationRequest, GenerationResult

RESULT_TTL_S = 86_400  # A run that stopped in the night is gone on with in the morning.
QUEUED_TTL_S = 7 * 86_400
LIST_TTL_S = 8 * 86_400  # Over that of all it lists.
MAX_IN_FLIGHT = 2_048
# Times the workers' slots: a worker claims twice its own, and a job is answered with its last row.
WINDOW_OF_SLOTS = 4
MAX_LOSSES = 10  # Of a row whose job was gone without an answer, each time; then it is an error.
ENDED = frozenset({"finished", "failed"})
CANCELLED = frozenset({None, "canceled", "stopped"})


@dataclass(frozen=True, slots=True)
class _Job:
    """A job under way: its last position, and the rows that its last requests are.

    Attributes:
        rows: None for a request whose row another job has.
        is_found: an earlier start has sent it, perhaps with more rows at its front.
    """

    last: int
    rows: Sequence[PendingRow | None]
    is_found: bool = False

    @property
    def pending(self) -> list[PendingRow]:
        """The rows that wait for it."""
        return [row for row in self.rows if row is not None]

    @property
    def num_sequences(self) -> int:
        """How much of the window it fills."""
        return sum(row.num_sequences for row in self.pending)


@dataclass(frozen=True, slots=True)
class _Ended:
    """A job whose results were handed out, and which is in Redis until they are durable."""

    last: int
    num_sequences: int
    is_failed: bool


class Window:
    """The jobs of one run that have not ended.

    Args:
        run_id: of the run, in the names of all its jobs.
        model: asked for in each request; None takes whatever the worker serves.
        fingerprint: the kind of workers that jobs added from now on are bound to; None: any.

    Attributes:
        max_in_flight: sequences at the most, but for one row of many samples.
        job_sequences: sequences a job at the most.
        num_lost: jobs that were gone from Redis without an answer.
    """

    def __init__(
        self,
        client: Client,
        queue: str,
        run_id: str,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        job_sequences: int = 1,
        model: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.max_in_flight = max_in_flight
        self.job_sequences = job_sequences
        self.fingerprint = fingerprint
        self.num_lost = 0
        self._client = client
        self._queue = queue
        self._run_id = run_id
        self._model = model
        self._jobs: dict[str, _Job] = {}
        self._unsent: dict[str, OutgoingJob] = {}
        self._found = FoundJobs()
        self._ended: dict[str, _Ended] = {}
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

    @property
    def num_kept(self) -> int:
        """Sequences of ended jobs that are still in Redis."""
        return sum(job.num_sequences for job in self._ended.values())

    def find(self, position: int) -> int:
        """Look for jobs of an earlier start of the run, which goes on at this row; their number.

        What they hold of rows before it is deleted. What has not ended and is not bound as the run
        is now is taken back: to the wrong kind of worker, it might wait for ever; to none, the
        wrong kind might generate it.
        """
        names = []
        useless, settled = [], []
        for job_id, job in self._client.listed(jobs_key(self._run_id)).items():
            name = JobName.parse(job_id)
            if name is None or name.last < position or job.status in CANCELLED:
                settled.append(job_id)
            elif job.status in ENDED or self._suits(job):
                names.append(name)
            else:
                useless.append(job_id)
        self._forget([*settled, *self._cancelled(useless)])
        self._found = FoundJobs(names)
        return len(names)

    def add(self, rows: Sequence[PendingRow], end: int) -> None:
        """Take in the next rows of the input, all that there are before the position `end`.

        Those in a job of an earlier start are awaited there; the others are packed and submitted.
        """
        group: list[PendingRow] = []
        for row in rows:
            if self._found.take(row):
                self._submit(group, skips=True)
                group = []
            else:
                group.append(row)
        self._submit(group, skips=True)
        for found in self._found.complete(end):
            self._await(str(found.name), _Job(found.name.last, found.rows, is_found=True))

    def add_again(self, rows: Sequence[PendingRow], *, alone: bool = False) -> None:
        """Take rows in for another attempt, `alone` if a bad one must not fail its job again."""
        ordered = sorted(rows, key=lambda row: row.position)
        self._submit(ordered, skips=False, max_sequences=1 if alone else self.job_sequences)

    def send(self) -> None:
        """Send what was added. After an error the same jobs go again, under the same ids.

        Some may be in Redis already: a reply can be lost, and Redis can run full half-way.
        """
        if self._unsent:
            self._client.send(list(self._unsent.values()))
            self._unsent.clear()

    def collect(self, timeout_s: float) -> list[tuple[PendingRow, GenerationResult]]:
        """The results of the jobs that have ended; waits for the first, `timeout_s` at the most.

        Rows whose job is gone without an answer go into another, and are no results.
        """
        if not self._jobs:
            return []
        results: list[tuple[PendingRow, GenerationResult]] = []
        lost: list[PendingRow] = []
        for job_id, state in self._client.ended(list(self._jobs), timeout_s).items():
            if state.status is None and job_id in self._unsent:
                continue  # Not gone: not there yet.
            job = self._jobs.pop(job_id)
            self._unsent.pop(job_id, None)
            self._num_in_flight -= job.num_sequences
            if state.status is None:
                self.num_lost += 1
                lost += job.pending
            else:
                failed = state.status == "failed"
                self._ended[job_id] = _Ended(job.last, job.num_sequences, failed)
                results += _answers(job_id, job, state)
        return results + list(self._send_again(lost))

    def forget(self, position: int) -> None:
        """Delete ended jobs whose rows are all before this position; if Redis is away, later."""
        past = {job_id: job for job_id, job in self._ended.items() if job.last < position}
        # A failed job stays for whoever looks into failures; the others have said all.
        failed = [job_id for job_id, job in past.items() if job.is_failed]
        with suppress(ShoalError):
            self._forget([job_id for job_id, job in past.items() if not job.is_failed])
            self._client.unlist(failed, jobs_key(self._run_id))
            for job_id in past:
                del self._ended[job_id]

    def leave(self, *, takes_all: bool = False) -> None:
        """Take back what no worker has begun, or all that has not ended; results stay for a day."""
        states = self._client.states(list(self._jobs))
        unfinished = [
            job_id
            for job_id, state in states.items()
            if state.status == "queued" or (takes_all and not state.is_final)
        ]
        self._forget(self._cancelled(unfinished))
        self._jobs.clear()
        self._unsent.clear()
        self._num_in_flight = 0

    def _suits(self, job: ListedJob) -> bool:
        """Whether a job that has not ended is bound as the run is now.

        What runs already and is bound to nobody is let run: who answers it is looked at then.
        """
        is_free = job.status == "started" and job.fingerprint is None
        return is_free or job.fingerprint == self.fingerprint

    def _submit(
        self, rows: Sequence[PendingRow], *, skips: bool, max_sequences: int | None = None
    ) -> None:
        limit = self.job_sequences if max_sequences is None else max_sequences
        for group in pack_rows(rows, limit, skips=skips):
            for row in group:
                row.attempts += 1
            attempt = max(row.attempts for row in group)
            name = JobName(self._run_id, group[0].position, group[-1].position, attempt)
            self._unsent[str(name)] = self._outgoing(str(name), group)
            self._await(str(name), _Job(name.last, group))

    def _await(self, job_id: str, job: _Job) -> None:
        self._jobs[job_id] = job
        self._num_in_flight += job.num_sequences

    def _outgoing(self, job_id: str, rows: Iterable[PendingRow]) -> OutgoingJob:
        key = jobs_key(self._run_id)
        return outgoing_job(
            [self._request(row) for row in rows],
            queue=self._queue,
            job_id=job_id,
            result_ttl_s=RESULT_TTL_S,
            fingerprint=self.fingerprint,
            queued_ttl_s=QUEUED_TTL_S,
            along=(("SADD", key, job_id), ("EXPIRE", key, LIST_TTL_S)),
        )

    def _request(self, row: PendingRow) -> GenerationRequest:
        request = row.row.request
        if self._model is None or request.model is not None:
            return request  # A batch line may name the model that it is for.
        return request.model_copy(update={"model": self._model})

    def _send_again(
        self, rows: Sequence[PendingRow]
    ) -> Iterator[tuple[PendingRow, GenerationResult]]:
        """Rows that nobody has failed: the same attempt once more, up to a limit."""
        again = []
        for row in rows:
            row.losses += 1
            if row.losses > MAX_LOSSES:
                yield row, lost_result(row.row.id, row.losses)
            else:
                row.attempts -= 1
                again.append(row)
        self.add_again(again)

    def _cancelled(self, job_ids: Sequence[str]) -> list[str]:
        """Cancel these, and tell which had not ended: the others have results to be found."""
        return [job_id for job_id in job_ids if self._client.cancel(Handle(job_id))]

    def _forget(self, job_ids: Sequence[str]) -> None:
        self._client.forget(job_ids, self._queue, listed_at=jobs_key(self._run_id))


def take_back(client: Client, queue: str, run_id: str) -> None:
    """Cancel and delete all jobs of a run that nobody will go on with."""
    key = jobs_key(run_id)
    listed: dict[str, ListedJob] = client.listed(key)
    for job_id in listed:
        client.cancel(Handle(job_id))
    client.forget(list(listed), queue, listed_at=key)


def _answers(
    job_id: str, job: _Job, state: JobState
) -> Iterator[tuple[PendingRow, GenerationResult]]:
    ids = [None if row is None else row.row.request.id or row.row.id for row in job.rows]
    results = results_of(state, job_id, ids, has_more=job.is_found)
    for row, result in zip(job.rows, results, strict=True):
        if row is not None:
            yield row, result
