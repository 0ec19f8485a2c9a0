"""One Redis and the jobs in it, on an event loop: the asyncio twin of `shoal.job_queue`.

One connection waits for all results of all callers (XREAD over many streams, a second at the most,
since RQ writes nothing when a job is cancelled); another sends, everything at hand in one pipeline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import redis
from rq.job import Job as RQJob

from shoal.cancellation import (
    CANCEL_JOB,
    CANCEL_REQUEST,
    cancel_job_arguments,
    cancel_request_arguments,
)
from shoal.embedded import EmbeddedRedis
from shoal.errors import ResultTimeout, ShoalError
from shoal.job_queue import MAX_BLOCK_S, MAX_STATES_PER_READ
from shoal.job_states import (
    JobState,
    read_job_result,
    read_states,
    state_commands,
)
from shoal.jobs import (
    ENQUEUE_ONCE,
    Handle,
    OutgoingJob,
    results_key,
    stream_key,
)
from shoal.redis_url import connect_async, redis_errors, resolve_url
from shoal.wire import JobResult

STREAM_BLOCK_MS = 100  # The result itself comes over another connection.
RECANCEL_S = 0.05


@dataclass(slots=True)
class _Batch:
    """Jobs that are submitted in one round trip."""

    sent: asyncio.Future[None]
    jobs: list[OutgoingJob] = field(default_factory=list)


class AsyncJobQueue:
    """The jobs of one Redis, for callers on one event loop.

    Args:
        redis_url: as `JobQueue`; without any, this user's embedded Redis.
    """

    def __init__(self, redis_url: str | None = None) -> None:
        self._named_url = resolve_url(redis_url)
        self.redis_url = self._named_url or ""
        self._resources = AsyncExitStack()
        self._waits: dict[str, asyncio.Future[JobResult]] = {}
        self._waits_changed = asyncio.Event()
        self._batch: _Batch | None = None
        self._sending = asyncio.Lock()
        self._flushes: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if self._named_url is None:
                embedded = EmbeddedRedis()
                await asyncio.to_thread(embedded.start)
                stack.callback(embedded.close)
                self.redis_url = embedded.url
            self.redis = await connect_async(self.redis_url)
            stack.push_async_callback(self.redis.aclose)
            self._enqueue_once = self.redis.register_script(ENQUEUE_ONCE)
            self._cancel_job = self.redis.register_script(CANCEL_JOB)
            self._cancel_request = self.redis.register_script(CANCEL_REQUEST)
            reader = asyncio.create_task(self._read_results(), name="shoal-results")
            reader.add_done_callback(self._reader_ended)
            stack.push_async_callback(cancelled, reader)
            self._resources = stack.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop waiting, close the connections, and the embedded Redis if nobody else uses it."""
        await self._resources.aclose()
        for wait in self._waits.values():
            wait.cancel()
        self._waits.clear()

    async def state(self, job_id: str) -> JobState:
        """What Redis says of a job now."""
        return (await self.states([job_id]))[job_id]

    async def wait(self, job_id: str, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109
        """All results of a job, when it is final; errors as `Client.wait`."""
        # Shielded: several callers may await one job, and one's time-out is not the others'.
        future = asyncio.shield(self.outcome(job_id))
        try:
            return await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise ResultTimeout(f"no result of {job_id} within {timeout:g} s; it goes on") from None

    async def cancel(self, handle: Handle) -> bool:
        """Cancel a request: its whole job if it holds nothing else; True if it had not ended."""
        with redis_errors(self.redis_url):
            if handle.num_requests > 1:
                keys, args = cancel_request_arguments(handle)
                return bool(await self._cancel_request(keys=keys, args=args))
            queue: Any = await self.redis.hget(RQJob.key_for(handle.job_id), "origin")
            if queue is None:
                return False
            keys, args = cancel_job_arguments(handle.job_id, queue.decode())
            return bool(await self._cancel_job(keys=keys, args=args))

    async def send(self, jobs: Sequence[OutgoingJob]) -> None:
        """Enqueue jobs; one that is there already stays as it is.

        Raises:
            QueueFull: Redis takes no more.
        """
        # Whatever is submitted while one pipeline is under way goes together in the next.
        if self._batch is None:
            self._batch = _Batch(asyncio.get_running_loop().create_future())
            flush = asyncio.create_task(self._flush(self._batch), name="shoal-submit")
            self._flushes.add(flush)
            flush.add_done_callback(self._flushes.discard)
        batch = self._batch
        batch.jobs += jobs
        await asyncio.shield(batch.sent)

    async def read_stream(self, job_id: str, last_id: str) -> list[Any]:
        """New entries of a streaming job's text, after up to a tenth of a second."""
        streams: dict[Any, Any] = {stream_key(job_id): last_id}
        with redis_errors(self.redis_url):
            replies: Any = await self.redis.xread(streams, block=STREAM_BLOCK_MS)
        return [entry for _key, found in replies or [] for entry in found]

    def outcome(self, job_id: str) -> asyncio.Future[JobResult]:
        """The one future of a job's results; the reader is told when it is new."""
        if job_id not in self._waits:
            future = asyncio.get_running_loop().create_future()
            future.add_done_callback(_retrieve_exception)
            self._waits[job_id] = future
            self._waits_changed.set()
        return self._waits[job_id]

    async def _read_results(self) -> None:
        """Serve all waits for as long as the client is open; Redis's absence ends the waits."""
        async with self.redis.client() as reader:
            while True:
                await self._waits_changed.wait()
                try:
                    with redis_errors(self.redis_url):
                        await self._read_until_none_wait(reader)
                except ShoalError as error:
                    self._fail_waits(error)

    async def _read_until_none_wait(self, reader: redis.asyncio.Redis) -> None:
        running: dict[str, JobState] = {}
        swept_s = time.monotonic()
        ended: set[str] = set()
        while self._waits:
            self._waits_changed.clear()
            due = time.monotonic() - swept_s >= MAX_BLOCK_S
            if due:
                swept_s = time.monotonic()
            # Cancelled jobs write no result: all statuses are read once a second.
            to_read = [job for job in self._waits if due or job in ended or job not in running]
            running |= await self.states(to_read)
            for job_id in to_read:
                if running[job_id].is_final:
                    _settle(self._waits.pop(job_id), running.pop(job_id), job_id)
            ended = await self._block(reader, running) if running else set()

    async def _block(self, reader: redis.asyncio.Redis, states: dict[str, JobState]) -> set[str]:
        """Until a job has a new result or a new job is awaited; the ids of jobs with results."""
        streams: dict[Any, Any] = {
            results_key(job_id): state.entry_id or "0-0" for job_id, state in states.items()
        }
        client_id = await reader.client_id()
        block_ms = int(MAX_BLOCK_S * 1000)
        read = asyncio.ensure_future(reader.xread(streams, count=1, block=block_ms))
        changed = asyncio.ensure_future(self._waits_changed.wait())
        try:
            await asyncio.wait({read, changed}, return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                await self.redis.client_unblock(client_id)
            replies: Any = await read or []
        finally:
            await cancelled(read, changed)
        prefix = len(results_key(""))
        return {key.decode()[prefix:] for key, _entries in replies}

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        # Only a defect ends it early; its waits must not hang for that.
        if not reader.cancelled() and (error := reader.exception()) is not None:
            self._fail_waits(error)

    def _fail_waits(self, error: BaseException) -> None:
        for future in self._waits.values():
            if not future.done():
                future.set_exception(error)
        self._waits.clear()

    async def _flush(self, batch: _Batch) -> None:
        try:
            async with self._sending:
                self._batch = None
                with redis_errors(self.redis_url):
                    async with self.redis.pipeline(transaction=False) as pipeline:
                        for job in batch.jobs:
                            await self._enqueue_once(
                                keys=[job.key], args=job.script_args, client=pipeline
                            )
                        await pipeline.execute()
        except (ShoalError, redis.RedisError) as error:
            batch.sent.set_exception(error)
        else:
            batch.sent.set_result(None)

    async def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """What Redis says of each job now."""
        states: dict[str, JobState] = {}
        for start in range(0, len(job_ids), MAX_STATES_PER_READ):
            some = job_ids[start : start + MAX_STATES_PER_READ]
            with redis_errors(self.redis_url):
                async with self.redis.pipeline(transaction=True) as pipeline:
                    for job_id in some:
                        for command in state_commands(job_id):
                            pipeline.execute_command(*command)
                    states |= read_states(some, await pipeline.execute())
        return states


def _settle(future: asyncio.Future[JobResult], state: JobState, job_id: str) -> None:
    if future.done():
        return  # Its caller was cancelled.
    try:
        future.set_result(read_job_result(state, job_id))
    except ShoalError as error:
        future.set_exception(error)


def _retrieve_exception(future: asyncio.Future[JobResult]) -> None:
    """Keep asyncio from warning of an error whose caller has gone away."""
    if not future.cancelled():
        future.exception()


async def cancelled(*futures: asyncio.Future[Any]) -> None:
    """Cancel futures and wait until all have ended, whatever their end."""
    waiting = set(futures)
    while waiting:
        for future in waiting:
            future.cancel()
        # More than once: redis-py loses a cancellation that reaches it while it takes a connection.
        # Not awaited themselves: a cancellation of the caller's own must go through.
        ended, waiting = await asyncio.wait(waiting, timeout=RECANCEL_S)
        for future in ended:
            _retrieve_exception(future)
