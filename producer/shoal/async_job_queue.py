"""One Redis and the jobs in it, on an event loop: the asyncio twin of `shoal.job_queue`.

Owns the connections and the sending: everything at hand goes in one pipeline. Waiting for results
is `shoal.async_results`'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

from redis import OutOfMemoryError
from rq.job import Job as RQJob

from shoal.async_results import ResultReader, cancelled, retrieve_exception
from shoal.cancellation import (
    CANCEL_JOB,
    CANCEL_REQUEST,
    cancel_job_arguments,
    cancel_request_arguments,
)
from shoal.embedded import EmbeddedRedis
from shoal.errors import ShoalError
from shoal.job_states import JobState, read_states, state_reads
from shoal.jobs import ENQUEUE_ONCE, Command, Handle, OutgoingJob, stream_key
from shoal.redis_url import connect_async, redis_errors, resolve_url
from shoal.wire import JobResult

STREAM_BLOCK_MS = 100  # The result itself comes over another connection.


@dataclass(slots=True)
class _RoundTrip:
    """Jobs that are submitted together, and the answer to all who submit them."""

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
        self._results: ResultReader | None = None
        self._next: _RoundTrip | None = None
        self._sending = asyncio.Lock()
        self._senders: set[asyncio.Task[None]] = set()

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
            self._results = ResultReader(self.redis, self.redis_url, self.states)
            stack.push_async_callback(self._results.aclose)
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
        """Close the connections, and the embedded Redis if nobody else uses it.

        Whoever still waits for a result, or for jobs to be sent, gets a ShoalError that says so.
        """
        self._results = None
        await cancelled(*self._senders)
        await self._resources.aclose()

    async def state(self, job_id: str) -> JobState:
        """What Redis says of a job now."""
        return (await self.states([job_id]))[job_id]

    async def wait(self, job_id: str, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109
        """All results of a job, when it is final; errors as `Client.wait`."""
        return await self._open_results().wait(job_id, timeout)

    async def cancel(self, handle: Handle) -> bool:
        """Cancel a request: its whole job if it holds nothing else; True if it had not ended."""
        self._open_results()
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
        self._open_results()
        # Whatever is submitted while one pipeline is under way goes together in the next.
        if self._next is None:
            self._next = _RoundTrip(asyncio.get_running_loop().create_future())
            self._next.sent.add_done_callback(retrieve_exception)
            sender = asyncio.create_task(self._send(self._next), name="shoal-submit")
            self._senders.add(sender)
            sender.add_done_callback(partial(self._sender_ended, self._next))
        together = self._next
        together.jobs += jobs
        await asyncio.shield(together.sent)

    async def read_stream(self, job_id: str, last_id: str) -> list[Any]:
        """New entries of a streaming job's text, after up to a tenth of a second."""
        streams: dict[Any, Any] = {stream_key(job_id): last_id}
        with redis_errors(self.redis_url):
            replies: Any = await self.redis.xread(streams, block=STREAM_BLOCK_MS)
        return [entry for _key, found in replies or [] for entry in found]

    async def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """What Redis says of each job now."""
        states: dict[str, JobState] = {}
        for some, commands in state_reads(job_ids):
            with redis_errors(self.redis_url):
                try:
                    replies = await self._read(commands, transaction=True)
                except OutOfMemoryError:
                    # As in `JobQueue.states`: what is there is read even when Redis is full.
                    replies = await self._read(commands, transaction=False)
            states |= read_states(some, replies)
        return states

    async def _read(self, commands: Sequence[Command], *, transaction: bool) -> list[Any]:
        async with self.redis.pipeline(transaction=transaction) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return await pipeline.execute()

    async def _send(self, together: _RoundTrip) -> None:
        try:
            async with self._sending:
                self._next = None
                with redis_errors(self.redis_url):
                    await self._enqueue(together.jobs)
        except Exception as error:  # noqa: BLE001
            # An edge: several callers wait here, and none of them must hang, whatever it was.
            together.sent.set_exception(error)
        else:
            together.sent.set_result(None)

    async def _enqueue(self, jobs: Sequence[OutgoingJob]) -> None:
        async with self.redis.pipeline(transaction=False) as pipeline:
            pipeline.script_load(ENQUEUE_ONCE)  # As in `JobQueue.send`.
            for job in jobs:
                pipeline.evalsha(self._enqueue_once.sha, 1, job.key, *job.script_args)
            await pipeline.execute()

    def _sender_ended(self, together: _RoundTrip, sender: asyncio.Task[None]) -> None:
        self._senders.discard(sender)
        if self._next is together:
            self._next = None
        # Cancelled, perhaps before it began: the client is being closed.
        if not together.sent.done():
            text = "the client was closed while jobs were being sent; some may be queued"
            together.sent.set_exception(ShoalError(text))

    def _open_results(self) -> ResultReader:
        if self._results is None:
            raise ShoalError(
                "the client is closed, or was never opened: use it within "
                "`async with AsyncClient() as client:`"
            )
        return self._results
