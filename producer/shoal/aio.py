"""The asyncio client: the verbs of `shoal.client`, awaitable, thousands at once.

Owns the verbs and the handles; the exchanges with Redis are `shoal.async_job_queue`'s.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from typing import Any

from shoal.async_job_queue import AsyncJobQueue
from shoal.async_results import cancelled
from shoal.errors import ShoalError
from shoal.job_states import StreamedText, result_of
from shoal.jobs import (
    DEFAULT_RESULT_TTL_S,
    MAX_PACK_REQUESTS,
    Handle,
    OutgoingJob,
    as_requests,
    make_request,
    outgoing_job,
)
from shoal.submission import RequestGroups, packed_jobs, single_job
from shoal.wire import (
    QUEUE_DEFAULT,
    GenerationRequest,
    GenerationResult,
    JobResult,
    SamplingParams,
)


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
        job_result = await self._client.results_of(self.handle, timeout)
        result = result_of(self.handle, job_result)
        if self.request is None:
            return result
        return result.model_copy(update={"prompt": self.request.prompt})

    async def cancel(self) -> bool:
        """Cancel this request alone; True if it had not ended before."""
        return await self._client.cancel(self.handle)


class AsyncClient(AsyncJobQueue):
    """Submits requests and awaits their results on one event loop.

    Args:
        redis_url: as `Client`; without any, this user's embedded Redis.

    Use as `async with AsyncClient() as client`: connections open on entry and close on exit.
    """

    _last_read: tuple[str, JobResult] | None = None

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
        job = single_job(
            prompt,
            sampling,
            sampling_fields,
            queue=queue,
            result_ttl_s=result_ttl,
            idempotency_key=idempotency_key,
            deadline=deadline,
            id=id,
            service_class=service_class,
            model=model,
            metadata=metadata,
        )
        return (await self._submit([job]))[0]

    async def submit_many(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        queue: str = QUEUE_DEFAULT,
        result_ttl: int = DEFAULT_RESULT_TTL_S,
        requests_per_job: int = MAX_PACK_REQUESTS,
    ) -> list[AsyncJob]:
        """Send many requests, packed into jobs, in one round trip; one handle a request."""
        jobs = packed_jobs(
            requests,
            queue=queue,
            result_ttl_s=result_ttl,
            requests_per_job=requests_per_job,
        )
        return await self._submit(jobs)

    async def results_of(self, handle: Handle, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109
        """All results of a handle's job; see `Client.results_of`."""
        last = self._last_read
        if last is not None and last[0] == handle.job_id:
            return last[1]
        results = await self.wait(handle.job_id, timeout)
        if handle.num_requests > 1:
            self._last_read = handle.job_id, results
        return results

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
        groups = RequestGroups(as_requests(prompts, sampling, sampling_fields), max_in_flight)
        in_flight: deque[AsyncJob] = deque()
        while True:
            while group := groups.take(len(in_flight)):
                in_flight += await self.submit_many(
                    group, queue=queue, requests_per_job=groups.size
                )
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
        [job] = await self._submit([outgoing_job([request], queue=queue, stream=True)])
        result = asyncio.ensure_future(job.result(timeout))
        streamed = StreamedText(job.id)
        try:
            while not result.done():
                entries = await self.read_stream(job.handle.job_id, streamed.last_id)
                if fresh := streamed.add(entries):
                    yield fresh
            if rest := streamed.rest((await result).text):
                yield rest
        except (GeneratorExit, asyncio.CancelledError):
            with suppress(ShoalError):
                await job.cancel()
            raise
        finally:
            await cancelled(result)

    async def as_completed(self, jobs: Iterable[AsyncJob]) -> AsyncIterator[AsyncJob]:
        """The jobs as they end, whatever their end; `result()` of each then returns at once."""

        waiting: dict[str, list[AsyncJob]] = {}
        for job in jobs:
            waiting.setdefault(job.handle.job_id, []).append(job)
        tasks = [asyncio.create_task(self._ended(job_id)) for job_id in waiting]
        try:
            for task in asyncio.as_completed(tasks):
                for job in waiting[await task]:
                    yield job
        finally:
            await cancelled(*tasks)

    def job(self, job_id: str) -> AsyncJob:
        """A handle on a request submitted earlier, also by another process."""
        return AsyncJob(self, Handle.parse(job_id))

    async def _ended(self, job_id: str) -> str:
        with suppress(Exception):  # Whatever its end: `result()` tells.
            await self.wait(job_id)
        return job_id

    async def _submit(self, jobs: Sequence[OutgoingJob]) -> list[AsyncJob]:
        await self.send(jobs)
        return [
            AsyncJob(self, handle, request)
            for job in jobs
            for handle, request in zip(job.handles, job.requests, strict=True)
        ]
