"""One Redis and the jobs in it: sending them, and seeing what becomes of them.

Owns the blocking exchanges with Redis that `shoal.client` is made of. It knows jobs by their ids
and nothing of prompts; how a job is written and read is in `shoal.jobs` and `shoal.job_states`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import TracebackType
from typing import Any, Self

from redis import OutOfMemoryError
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job as RQJob

from shoal.cancellation import (
    CANCEL_JOB,
    CANCEL_REQUEST,
    cancel_job_arguments,
    cancel_request_arguments,
)
from shoal.embedded import EmbeddedRedis
from shoal.errors import QueueFull, ResultTimeout
from shoal.job_states import (
    JobState,
    ListedJob,
    listed_job,
    read_job_result,
    read_states,
    result_streams,
    state_reads,
)
from shoal.jobs import (
    ENQUEUE_ONCE,
    EXPIRIES_KEY,
    Command,
    Handle,
    OutgoingJob,
    cancel_key,
    results_key,
    stream_key,
)
from shoal.redis_url import connect, redis_errors, resolve_url
from shoal.wire import JobResult

KEYS_OF_A_JOB = (RQJob.key_for, results_key, stream_key, cancel_key)
MAX_BLOCK_S = 1.0  # RQ writes nothing when a job is cancelled, so the status is read this often.


class JobQueue:
    """The jobs of one Redis. Safe to share between threads.

    Args:
        redis_url: redis://, rediss://, unix:// or redis+sentinel://. None takes SHOAL_REDIS_URL,
            the file that SHOAL_REDIS_URL_FILE names, REDIS_URL, or the embedded Redis of this user.
        max_queued_jobs: `send` raises QueueFull while a queue holds so many jobs. None: no limit.

    Raises:
        RedisUnavailable: nothing answers at the address.
    """

    def __init__(self, redis_url: str | None = None, *, max_queued_jobs: int | None = None) -> None:
        self._resources = ExitStack()
        url = resolve_url(redis_url)
        self.is_embedded = url is None
        if url is None:
            url = self._resources.enter_context(EmbeddedRedis()).url
        self.redis_url = url
        self.max_queued_jobs = max_queued_jobs
        try:
            self.redis = connect(url)
        except BaseException:
            self._resources.close()
            raise
        self._resources.callback(self.redis.close)
        self._enqueue_once = self.redis.register_script(ENQUEUE_ONCE)
        self._cancel_job = self.redis.register_script(CANCEL_JOB)
        self._cancel_request = self.redis.register_script(CANCEL_REQUEST)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, and the embedded Redis if nobody else uses it."""
        self._resources.close()

    def state(self, job_id: str) -> JobState:
        """What Redis says of a job now."""
        return self.states([job_id])[job_id]

    def wait(self, job_id: str, timeout: float | None = None) -> JobResult:
        """All results of a job, when it is final.

        Raises:
            ResultTimeout: it is not final `timeout` seconds from now.
        """
        deadline = Deadline(timeout)
        while not (state := self.state(job_id)).is_final:
            self.block({job_id: state}, deadline)
        return read_job_result(state, job_id)

    def ended(self, job_ids: Sequence[str], timeout: float) -> dict[str, JobState]:
        """The final ones among these jobs, as soon as there are any; none at the time-out."""
        deadline = Deadline(timeout)
        while True:
            states = self.states(job_ids)
            final = {job_id: state for job_id, state in states.items() if state.is_final}
            if final:
                return final
            try:
                self.block(states, deadline)
            except ResultTimeout:
                return {}

    def listed(self, key: str) -> dict[str, ListedJob]:
        """The jobs in the set at `key`, as they are now."""
        with self._redis_errors():
            members: Any = self.redis.smembers(key)
            job_ids = sorted(member.decode() for member in members)
            with self.redis.pipeline(transaction=False) as pipeline:
                for job_id in job_ids:
                    pipeline.hmget(RQJob.key_for(job_id), "status", "meta")
                replies = pipeline.execute()
        return {job_id: listed_job(*reply) for job_id, reply in zip(job_ids, replies, strict=True)}

    def forget(self, job_ids: Sequence[str], queue: str, *, listed_at: str | None = None) -> None:
        """Delete jobs that have ended, with their results, before their time.

        For producers of many jobs: Redis holds prompts and results in memory.

        Args:
            listed_at: the key of a set that they leave as well.
        """
        if not job_ids:
            return
        keys = [key(job_id) for job_id in job_ids for key in KEYS_OF_A_JOB]
        with self._redis_errors(), self.redis.pipeline(transaction=False) as pipeline:
            pipeline.unlink(*keys)
            for registry in ("finished", "canceled"):
                pipeline.zrem(f"{RQ_KEY_PREFIX}:{registry}:{queue}", *job_ids)
            pipeline.zrem(EXPIRIES_KEY, *job_ids)
            if listed_at is not None:
                pipeline.srem(listed_at, *job_ids)
            pipeline.execute()

    def unlist(self, job_ids: Sequence[str], key: str) -> None:
        """Take jobs out of the set at `key`, and leave them as they are."""
        if job_ids:
            with self._redis_errors():
                self.redis.srem(key, *job_ids)

    def cancel(self, handle: Handle) -> bool:
        """Cancel a request: its whole job if it holds nothing else; True if it had not ended."""
        with self._redis_errors():
            if handle.num_requests > 1:
                keys, args = cancel_request_arguments(handle)
                return bool(self._cancel_request(keys=keys, args=args))
            queue: Any = self.redis.hget(RQJob.key_for(handle.job_id), "origin")
            if queue is None:
                return False
            keys, args = cancel_job_arguments(handle.job_id, queue.decode())
            return bool(self._cancel_job(keys=keys, args=args))

    def send(self, jobs: Sequence[OutgoingJob]) -> None:
        """Enqueue jobs in one round trip; one that is there already stays as it is.

        Raises:
            QueueFull: a queue or Redis takes no more.
        """
        with self._redis_errors():
            self._check_room(jobs)
            with self.redis.pipeline(transaction=False) as pipeline:
                pipeline.script_load(ENQUEUE_ONCE)  # In the same trip: no restart comes between.
                for job in jobs:
                    pipeline.evalsha(self._enqueue_once.sha, 1, job.key, *job.script_args)
                pipeline.execute()

    def execute(self, commands: Iterable[Command]) -> list[Any]:
        """Run commands in one transaction; a reply for each."""
        with self._redis_errors():
            return self._replies(commands, transaction=True)

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """What Redis says of each job now."""
        states: dict[str, JobState] = {}
        for some, commands in state_reads(job_ids):
            with self._redis_errors():
                try:
                    replies = self._replies(commands, transaction=True)
                except OutOfMemoryError:
                    # It refuses each command of a transaction, also those that only read. But what
                    # has a result must be read, and forgotten, for there to be room again.
                    replies = self._replies(commands, transaction=False)
            states |= read_states(some, replies)
        return states

    def _replies(self, commands: Iterable[Command], *, transaction: bool) -> list[Any]:
        with self.redis.pipeline(transaction=transaction) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return list(pipeline.execute())

    def block(self, states: dict[str, JobState], deadline: Deadline) -> None:
        """Until one of the jobs has a new result, a second at the most."""
        block_s = deadline.next_block_s(", ".join(islice(states, 3)))
        with self._redis_errors():
            self.redis.xread(result_streams(states), count=1, block=max(1, int(block_s * 1000)))

    def read_stream(
        self, job_id: str, last_id: str, state: JobState, deadline: Deadline
    ) -> list[Any]:
        """New entries of a streaming job's text, after up to a second; none once it is final."""
        streams = {stream_key(job_id): last_id, **result_streams({job_id: state})}
        block_ms = None if state.is_final else max(1, int(deadline.next_block_s(job_id) * 1000))
        with self._redis_errors():
            replies: Any = self.redis.xread(streams, block=block_ms)
        return list(dict(replies or {}).get(stream_key(job_id).encode(), []))

    def _check_room(self, jobs: Sequence[OutgoingJob]) -> None:
        if self.max_queued_jobs is None:
            return
        for queue in {job.queue for job in jobs}:
            num_queued = int(self.redis.llen(f"{RQ_KEY_PREFIX}:queue:{queue}"))
            if num_queued >= self.max_queued_jobs:
                raise QueueFull(
                    f"queue {queue} holds {num_queued} jobs; the limit is {self.max_queued_jobs}"
                )

    @contextmanager
    def _redis_errors(self) -> Iterator[None]:
        with redis_errors(self.redis_url):
            yield


class Deadline:
    """Counts a time-out down over several blocking reads."""

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s

    def next_block_s(self, what: str) -> float:
        """Seconds to block for now; raises ResultTimeout once none are left."""
        if self._end_s is None:
            return MAX_BLOCK_S
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise ResultTimeout(f"no result of {what} within {self._timeout_s:g} s; it goes on")
        return min(left_s, MAX_BLOCK_S)
