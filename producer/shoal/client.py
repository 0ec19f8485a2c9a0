"""The blocking client: submit prompts, await completions.

Owns the verbs and the handles. The exchanges with Redis are `shoal.job_queue`'s; how a request
becomes a job is in `shoal.jobs`, what a job's state means in `shoal.job_states`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from shoal.errors import ShoalError
from shoal.job_queue import Deadline, JobQueue
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


class Job:
    """A handle on one submitted request, also where many share an RQ job.

    Attributes:
        id: names the request; `Client.job(id)` makes the handle again in another process.
    """

    def __init__(
        self, client: Client, handle: Handle, request: GenerationRequest | None = None
    ) -> None:
        self._client = client
        self.handle = handle
        self.request = request

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    @property
    def id(self) -> str:
        """The job's id, with `:INDEX` where the job holds several requests."""
        return str(self.handle)

    @property
    def status(self) -> str:
        """RQ's status of the job: queued, started, finished, failed, canceled, or missing."""
        return self._client.state(self.handle.job_id).status or "missing"

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return self._client.state(self.handle.job_id).is_final

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the completions, `timeout` seconds at the most (None: for ever).

        Raises:
            ResultTimeout: nothing came in time; the job goes on.
            Cancelled, Expired, GenerationFailed, InvalidRequest: what became of it instead.
        """
        job_result = self._client.results_of(self.handle, timeout)
        return self._with_prompt(result_of(self.handle, job_result))

    def cancel(self) -> bool:
        """Cancel this request alone; True if it had not ended before."""
        return self._client.cancel(self.handle)

    def _with_prompt(self, result: GenerationResult) -> GenerationResult:
        if self.request is None:
            return result
        return result.model_copy(update={"prompt": self.request.prompt})


class Client(JobQueue):
    """Submits requests to a Redis queue and reads their results. Safe to share between threads.

    Arguments and errors are those of `JobQueue`: without an address, SHOAL_REDIS_URL, then
    REDIS_URL, then the embedded Redis of this user.
    """

    _last_read: tuple[str, JobResult] | None = None

    def submit(
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
    ) -> Job:
        """Send one prompt; give sampling as a SamplingParams or as its fields (`max_tokens=64`).

        Args:
            result_ttl: seconds the result is kept.
            deadline: seconds from now; past it the request ends with what it has.
            idempotency_key: the same key names the same job, however often it is submitted.

        Raises:
            InvalidRequest: a field is unknown, of the wrong type or out of range.
            QueueFull: the queue or Redis takes no more.
        """
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
        return self._submit([job])[0]

    def submit_many(
        self,
        requests: Iterable[GenerationRequest | str],
        *,
        queue: str = QUEUE_DEFAULT,
        result_ttl: int = DEFAULT_RESULT_TTL_S,
        requests_per_job: int = MAX_PACK_REQUESTS,
        stream: bool = False,
    ) -> list[Job]:
        """Send many requests, packed into jobs, in one round trip; one handle a request, in order.

        All are validated before the first is sent.

        Args:
            stream: whether `follow` will read along; it reads jobs of one request.
        """
        jobs = packed_jobs(
            requests,
            queue=queue,
            result_ttl_s=result_ttl,
            requests_per_job=requests_per_job,
            stream=stream,
        )
        return self._submit(jobs)

    def map(
        self,
        prompts: Iterable[str | list[int] | GenerationRequest],
        sampling: SamplingParams | None = None,
        *,
        queue: str = QUEUE_DEFAULT,
        max_in_flight: int = 512,
        timeout: float | None = None,
        **sampling_fields: object,
    ) -> Iterator[GenerationResult]:
        """Results in input order, with a bounded number of requests in flight.

        The input is read as results are taken, so it may be endless. `timeout` is for each result.
        """
        groups = RequestGroups(as_requests(prompts, sampling, sampling_fields), max_in_flight)
        in_flight: deque[Job] = deque()
        while True:
            while group := groups.take(len(in_flight)):
                in_flight += self.submit_many(group, queue=queue, requests_per_job=groups.size)
            if not in_flight:
                return
            yield in_flight.popleft().result(timeout)

    def as_completed(self, jobs: Iterable[Job], timeout: float | None = None) -> Iterator[Job]:
        """The jobs as they end, whatever their end; `result()` of each then returns at once.

        Raises:
            ResultTimeout: some had not ended `timeout` seconds after the call.
        """
        deadline = Deadline(timeout)
        waiting: dict[str, list[Job]] = {}
        for job in jobs:
            waiting.setdefault(job.handle.job_id, []).append(job)
        while waiting:
            states = self.states(list(waiting))
            ended = [job_id for job_id, state in states.items() if state.is_final]
            for job_id in ended:
                yield from waiting.pop(job_id)
            if not ended:
                self.block(states, deadline)

    def stream(
        self,
        prompt: str | list[int],
        sampling: SamplingParams | None = None,
        *,
        queue: str = QUEUE_DEFAULT,
        timeout: float | None = None,
        **sampling_fields: object,
    ) -> Iterator[str]:
        """The first completion's text as it is made, piece by piece.

        It is submitted when the first piece is asked for, and cancelled when the iterator is closed
        before the last: nobody would read on.

        Raises:
            As `Job.result`; a wait of `timeout` seconds in all is a ResultTimeout.
        """
        request = make_request(prompt, sampling, fields=sampling_fields)
        return self._stream(request, queue, timeout)

    def follow(
        self, job: Job, timeout: float | None = None, *, on_idle: Callable[[], None] | None = None
    ) -> Iterator[str]:
        """The text of a job that was submitted for streaming; what the stream lost comes last.

        `on_idle` is called each time a second or so has brought nothing; it may raise.
        """
        deadline = Deadline(timeout)
        job_id = job.handle.job_id
        streamed = StreamedText(job.id)
        while True:
            state = self.state(job_id)
            fresh = streamed.add(self.read_stream(job_id, streamed.last_id, state, deadline))
            if fresh:
                yield fresh
            elif on_idle is not None:
                on_idle()
            if state.is_final:
                if rest := streamed.rest(job.result(0).text):
                    yield rest
                return

    def job(self, job_id: str) -> Job:
        """A handle on a request submitted earlier, also by another process."""
        return Job(self, Handle.parse(job_id))

    def results_of(self, handle: Handle, timeout: float | None = None) -> JobResult:
        """All results of a handle's job, when it is final; errors as `wait`.

        A job of many requests is mostly asked for one after the other: it is read once for all.
        """
        last = self._last_read
        if last is not None and last[0] == handle.job_id:
            return last[1]
        results = self.wait(handle.job_id, timeout)
        if handle.num_requests > 1:
            self._last_read = handle.job_id, results
        return results

    def _stream(
        self, request: GenerationRequest, queue: str, timeout: float | None
    ) -> Iterator[str]:
        [job] = self._submit([outgoing_job([request], queue=queue, stream=True)])
        try:
            yield from self.follow(job, timeout)
        except (GeneratorExit, KeyboardInterrupt):
            with suppress(ShoalError):
                job.cancel()
            raise

    def _submit(self, jobs: Sequence[OutgoingJob]) -> list[Job]:
        self.send(jobs)
        return [
            Job(self, handle, request)
            for job in jobs
            for handle, request in zip(job.handles, job.requests, strict=True)
        ]
