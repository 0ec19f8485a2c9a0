"""The asyncio client: the verbs of `shoal.client`, awaitable, thousands at once.

One connection waits for all results of all callers (XREAD over many streams); another sends. How a
request becomes a job and what a job's state means is in `shoal.jobs`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any, Self

import redis

from shoal.client import Client
from shoal.embedded import EmbeddedRedis
from shoal.errors import ResultTimeout, ShoalError
from shoal.job_queue import MAX_BLOCK_S, MAX_STATES_PER_READ
from shoal.job_states import (
    JobState,
    StreamedText,
    read_job_result,
    read_states,
    result_of,
    state_commands,
)
from shoal.jobs import (
    DEFAULT_RESULT_TTL_S,
    ENQUEUE_ONCE,
    MAX_PACK_REQUESTS,
    Handle,
    OutgoingJob,
    as_requests,
    make_request,
    new_job_id,
    outgoing_job,
    pack,
    pack_size,
    results_key,
    stream_key,
)
from shoal.redis_url import connect_async, redis_errors, resolve_url
from shoal.wire import QUEUE_DEFAULT, GenerationRequest, GenerationResult, JobResult, SamplingParams

STREAM_BLOCK_MS = 100  # The result itself comes over another connection.


class AsyncJob:
    """A handle on one submitted request; see `shoal.client.Job`."""

    def __init__(
        self, client: AsyncClient, handle: Handle, request: GenerationRequest | None = None
    ) -> None:
        self._client = client
        self.handle = handle
        self.request = request

    def __repr__(self) -> str:
        return f"<AsyncJob {self.id}>"

    @property
    def id(self) -> str:
        """The job's id, with `:INDEX` where the job holds several requests."""
        return str(self.handle)

    async def status(self) -> str:
        """RQ's status of the job: queued, started, finished, failed, canceled, or missing."""
        return (await self._client.state(self.handle.job_id)).status or "missing"

    async def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return (await self._client.state(self.handle.job_id)).is_final

    async def result(self, timeout: float | None = None) -> GenerationResult:  # noqa: ASYNC109
        """Wait for the completions; errors as `shoal.client.Job.result`."""
        job_result = await self._client.wait(self.handle.job_id, timeout)
        result = result_of(self.handle, job_result)
        if self.request is None:
            return result
        return result.model_copy(update={"prompt": self.request.prompt})

    async def cancel(self) -> bool:
        """Cancel this request alone; True if it had not ended before."""
        return await self._client.cancel(self.handle)


@dataclass(slots=True)
class _Batch:
    """Jobs that are submitted in one round trip."""

    sent: asyncio.Future[None]
    jobs: list[OutgoingJob] = field(default_factory=list)


class AsyncClient:
    """Submits requests and awaits their results on one event loop.

    Args:
        redis_url: as `Client`; without any, this user's embedded Redis.

    Use as `async with AsyncClient() as client`: connections open on entry and close on exit.
    """

    def __init__(self, redis_url: str | None = None) -> None:
        self.redis_url = resolve_url(redis_url) or ""
        self._resources = AsyncExitStack()
        self._waits: dict[str, asyncio.Future[JobResult]] = {}
        self._waits_changed = asyncio.Event()
        self._batch: _Batch | None = None
        self._sending = asyncio.Lock()
        self._flushes: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if not self.redis_url:
                embedded = EmbeddedRedis()
                await asyncio.to_thread(embedded.start)
                stack.callback(embedded.close)
                self.redis_url = embedded.url
            self.redis = await connect_async(self.redis_url)
            stack.push_async_callback(self.redis.aclose)
            self._enqueue_once = self.redis.register_script(ENQUEUE_ONCE)
            reader = asyncio.create_task(self._read_results(), name="shoal-results")
            reader.add_done_callback(self._reader_ended)
            stack.push_async_callback(_cancelled, reader)
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

    async def submit(
        self,
        prompt: str | list[int],
        sampling: SamplingParams | None = None,
        *,
        queue: str = QUEUE_DEFAULT,
        result_ttl: int = DEFAULT_RESULT_TTL_S,
        deadline: float | None = None,
        idempotency_key: str | None = None,
        id: str | None = None,  # noqa: A002 - the wire's name
        service_class: str | None = None,
        model: str | None = None,
        metadata: dict[str, Any] | None = None,
        **sampling_fields: object,
    ) -> AsyncJob:
        """Send one prompt; arguments and errors as `Client.submit`."""
        request = make_request(
            prompt,
            sampling,
            fields=sampling_fields,
            deadline=deadline,
            id=id,
            service_class=service_class,
            model=model,
            metadata=metadata,
        )
        job_id = new_job_id(idempotency_key)
        outgoing = outgoing_job([request], queue=queue, job_id=job_id, result_ttl_s=result_ttl)
        return (await self._send([outgoing]))[0]

    async def submit_many(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        queue: str = QUEUE_DEFAULT,
        result_ttl: int = DEFAULT_RESULT_TTL_S,
        requests_per_job: int = MAX_PACK_REQUESTS,
    ) -> list[AsyncJob]:
        """Send many requests, packed into jobs, in one round trip; one handle a request."""
        checked = [make_request(r) if isinstance(r, str) else r for r in requests]
        groups = pack(checked, requests_per_job)
        return await self._send(
            [outgoing_job(group, queue=queue, result_ttl_s=result_ttl) for group in groups]
        )

    async def generate(
        self,
        prompt: str | list[int],
        sampling: SamplingParams | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        **options: Any,
    ) -> GenerationResult:
        """Submit one prompt and await its completions; options as `submit`."""
        job = await self.submit(prompt, sampling, **options)
        return await job.result(timeout)

    async def map(
        self,
        prompts: Iterable[str | list[int] | GenerationRequest],
        sampling: SamplingParams | None = None,
        *,
        queue: str = QUEUE_DEFAULT,
        max_in_flight: int = 512,
        timeout: float | None = None,  # noqa: ASYNC109
        **sampling_fields: object,
    ) -> AsyncIterator[GenerationResult]:
        """Results in input order, with a bounded number of requests in flight; see `Client.map`."""
        requests = as_requests(prompts, sampling, sampling_fields)
        size = pack_size(max_in_flight)
        in_flight: deque[AsyncJob] = deque()
        while True:
            while len(in_flight) + size <= max(max_in_flight, size):
                group = list(islice(requests, size))
                if not group:
                    break
                in_flight += await self.submit_many(group, queue=queue, requests_per_job=size)
            if not in_flight:
                return
            yield await in_flight.popleft().result(timeout)

    async def stream(
        self,
        prompt: str | list[int],
        sampling: SamplingParams | None = None,
        *,
        queue: str = QUEUE_DEFAULT,
        timeout: float | None = None,  # noqa: ASYNC109
        **sampling_fields: object,
    ) -> AsyncIterator[str]:
        """The first completion's text as it is made; see `Client.stream`."""
        request = make_request(prompt, sampling, fields=sampling_fields)
        [job] = await self._send([outgoing_job([request], queue=queue, stream=True)])
        result = asyncio.ensure_future(job.result(timeout))
        streamed = StreamedText()
        try:
            while not result.done():
                entries = await self._read_stream(job.handle.job_id, streamed.last_id)
                if fresh := streamed.add(entries):
                    yield fresh
            if rest := streamed.rest((await result).text):
                yield rest
        finally:
            await _cancelled(result)

    async def _read_stream(self, job_id: str, last_id: str) -> list[Any]:
        streams: dict[Any, Any] = {stream_key(job_id): last_id}
        with redis_errors(self.redis_url):
            replies: Any = await self.redis.xread(streams, block=STREAM_BLOCK_MS)
        return [entry for _key, found in replies or [] for entry in found]

    async def as_completed(self, jobs: Iterable[AsyncJob]) -> AsyncIterator[AsyncJob]:
        """The jobs as they end, whatever their end; `result()` of each then returns at once."""

        async def ended(job: AsyncJob) -> AsyncJob:
            await asyncio.wait([self._future(job.handle.job_id)])
            return job

        for wait in asyncio.as_completed([ended(job) for job in jobs]):
            yield await wait

    def job(self, job_id: str) -> AsyncJob:
        """A handle on a request submitted earlier, also by another process."""
        return AsyncJob(self, Handle.parse(job_id))

    async def state(self, job_id: str) -> JobState:
        """What Redis says of a job now."""
        return (await self._states([job_id]))[job_id]

    async def wait(self, job_id: str, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109
        """All results of a job, when it is final; errors as `Client.wait`."""
        # Shielded: several callers may await one job, and one's time-out is not the others'.
        future = asyncio.shield(self._future(job_id))
        try:
            return await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise ResultTimeout(f"no result of {job_id} within {timeout:g} s; it goes on") from None

    async def cancel(self, handle: Handle) -> bool:
        """Cancel a request: its whole job if it holds nothing else; True if it had not ended."""
        # RQ's own cancel blocks and is rare: a thread with a connection of its own.
        return await asyncio.to_thread(_cancel, self.redis_url, handle)

    async def _send(self, jobs: Sequence[OutgoingJob]) -> list[AsyncJob]:
        # Whatever is submitted while one pipeline is under way goes together in the next.
        if self._batch is None:
            self._batch = _Batch(asyncio.get_running_loop().create_future())
            flush = asyncio.create_task(self._flush(self._batch), name="shoal-submit")
            self._flushes.add(flush)
            flush.add_done_callback(self._flushes.discard)
        batch = self._batch
        batch.jobs += jobs
        await asyncio.shield(batch.sent)
        return [
            AsyncJob(self, handle, request)
            for job in jobs
            for handle, request in zip(job.handles, job.requests, strict=True)
        ]

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

    async def _states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
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

    def _future(self, job_id: str) -> asyncio.Future[JobResult]:
        """The one future of a job; the reader is told when it is new."""
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
            running |= await self._states(to_read)
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
            for pending in (read, changed):
                await _cancelled(pending)
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


async def _cancelled(future: asyncio.Future[Any]) -> None:
    future.cancel()
    with suppress(asyncio.CancelledError):
        await future


def _cancel(redis_url: str, handle: Handle) -> bool:
    with Client(redis_url) as client:
        return client.cancel(handle)
