"""The blocking client: submit prompts, await completions.

Owns what is sent and when it is read again. How a request becomes a job and what a job's state
means is in `shoal.jobs`; where Redis is, in `shoal.redis_url` and `shoal.embedded`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import TracebackType
from typing import Any, Self

import redis
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job as RQJob
from rq.job import cancel_job
from rq.serializers import JSONSerializer

from shoal.embedded import EmbeddedRedis
from shoal.errors import QueueFull, RedisUnavailable, ResultTimeout
from shoal.jobs import (
    CANCEL_REQUEST,
    CANCEL_TTL_S,
    DEFAULT_RESULT_TTL_S,
    ENQUEUE_ONCE,
    MAX_PACK_REQUESTS,
    Handle,
    JobState,
    OutgoingJob,
    StreamedText,
    as_requests,
    cancel_key,
    make_request,
    new_job_id,
    outgoing_job,
    pack,
    pack_size,
    read_job_result,
    read_states,
    result_of,
    results_key,
    state_commands,
    stream_key,
)
from shoal.redis_url import connect, redacted, resolve_url
from shoal.wire import QUEUE_DEFAULT, GenerationRequest, GenerationResult, JobResult, SamplingParams

MAX_BLOCK_S = 1.0  # RQ writes nothing when a job is cancelled, so the status is read this often.
MAX_STATES_PER_READ = 1_000


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
        job_result = self._client.wait(self.handle.job_id, timeout)
        return self._with_prompt(result_of(self.handle, job_result))

    def cancel(self) -> bool:
        """Cancel this request alone; True if it had not ended before."""
        return self._client.cancel(self.handle)

    def _with_prompt(self, result: GenerationResult) -> GenerationResult:
        if self.request is None:
            return result
        return result.model_copy(update={"prompt": self.request.prompt})


class Client:
    """Submits requests to a Redis queue and reads their results. Safe to share between threads.

    Args:
        redis_url: redis://, rediss:// or unix://. None takes SHOAL_REDIS_URL, then REDIS_URL, then
            the embedded Redis of this user.
        max_queued_jobs: `submit` raises QueueFull while a queue holds so many jobs. None: no limit.

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
        return self._send([outgoing])[0]

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
        checked = [make_request(r) if isinstance(r, str) else r for r in requests]
        groups = pack(checked, requests_per_job)
        return self._send(
            [
                outgoing_job(group, queue=queue, result_ttl_s=result_ttl, stream=stream)
                for group in groups
            ]
        )

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
        requests = as_requests(prompts, sampling, sampling_fields)
        size = pack_size(max_in_flight)
        in_flight: deque[Job] = deque()
        while True:
            while len(in_flight) + size <= max(max_in_flight, size):
                group = list(islice(requests, size))
                if not group:
                    break
                in_flight += self.submit_many(group, queue=queue, requests_per_job=size)
            if not in_flight:
                return
            yield in_flight.popleft().result(timeout)

    def as_completed(self, jobs: Iterable[Job], timeout: float | None = None) -> Iterator[Job]:
        """The jobs as they end, whatever their end; `result()` of each then returns at once.

        Raises:
            ResultTimeout: some had not ended `timeout` seconds after the call.
        """
        deadline = _Deadline(timeout)
        waiting: dict[str, list[Job]] = {}
        for job in jobs:
            waiting.setdefault(job.handle.job_id, []).append(job)
        while waiting:
            states = self._states(list(waiting))
            ended = [job_id for job_id, state in states.items() if state.is_final]
            for job_id in ended:
                yield from waiting.pop(job_id)
            if not ended:
                self._block(states, deadline)

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

        Raises:
            As `Job.result`; a wait of `timeout` seconds in all is a ResultTimeout.
        """
        request = make_request(prompt, sampling, fields=sampling_fields)
        return self.follow(
            self._send([outgoing_job([request], queue=queue, stream=True)])[0], timeout
        )

    def follow(
        self, job: Job, timeout: float | None = None, *, on_idle: Callable[[], None] | None = None
    ) -> Iterator[str]:
        """The text of a job that was submitted for streaming; what the stream lost comes last.

        `on_idle` is called each time a second or so has brought nothing; it may raise.
        """
        deadline = _Deadline(timeout)
        job_id = job.handle.job_id
        streamed = StreamedText()
        while True:
            state = self.state(job_id)
            fresh = streamed.add(self._read_stream(job_id, streamed.last_id, state, deadline))
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

    def state(self, job_id: str) -> JobState:
        """What Redis says of a job now."""
        return self._states([job_id])[job_id]

    def wait(self, job_id: str, timeout: float | None = None) -> JobResult:
        """All results of a job, when it is final.

        Raises:
            ResultTimeout: it is not final `timeout` seconds from now.
        """
        deadline = _Deadline(timeout)
        while not (state := self.state(job_id)).is_final:
            self._block({job_id: state}, deadline)
        return read_job_result(state, job_id)

    def ended(self, job_ids: Sequence[str], timeout: float) -> dict[str, JobState]:
        """The final ones among these jobs, as soon as there are any; none at the time-out."""
        deadline = _Deadline(timeout)
        while True:
            states = self._states(job_ids)
            final = {job_id: state for job_id, state in states.items() if state.is_final}
            if final:
                return final
            try:
                self._block(states, deadline)
            except ResultTimeout:
                return {}

    def forget(self, job_ids: Sequence[str], queue: str) -> None:
        """Delete jobs that have ended, with their results, before their time.

        For producers of many jobs: Redis holds prompts and results in memory.
        """
        if not job_ids:
            return
        keys = [key for job_id in job_ids for key in (RQJob.key_for(job_id), results_key(job_id))]
        with self._redis_errors(), self.redis.pipeline(transaction=False) as pipeline:
            pipeline.unlink(*keys)
            for registry in ("finished", "canceled"):
                pipeline.zrem(f"{RQ_KEY_PREFIX}:{registry}:{queue}", *job_ids)
            pipeline.execute()

    def cancel(self, handle: Handle) -> bool:
        """Cancel a request: its whole job if it holds nothing else; True if it had not ended."""
        with self._redis_errors():
            if self.state(handle.job_id).is_final:
                return False
            if handle.num_requests > 1:
                keys = [RQJob.key_for(handle.job_id), cancel_key(handle.job_id)]
                return bool(self._cancel_request(keys=keys, args=[handle.index, CANCEL_TTL_S]))
            try:
                cancel_job(handle.job_id, connection=self.redis, serializer=JSONSerializer)
            except (InvalidJobOperation, NoSuchJobError):
                return False  # Somebody else was quicker.
            return True

    def _send(self, jobs: Sequence[OutgoingJob]) -> list[Job]:
        with self._redis_errors():
            self._check_room(jobs)
            with self.redis.pipeline(transaction=False) as pipeline:
                for job in jobs:
                    self._enqueue_once(keys=[job.key], args=job.script_args, client=pipeline)
                pipeline.execute()
        return [
            Job(self, handle, request)
            for job in jobs
            for handle, request in zip(job.handles, job.requests, strict=True)
        ]

    def _check_room(self, jobs: Sequence[OutgoingJob]) -> None:
        if self.max_queued_jobs is None:
            return
        for queue in {job.queue for job in jobs}:
            num_queued = int(self.redis.llen(f"{RQ_KEY_PREFIX}:queue:{queue}"))
            if num_queued >= self.max_queued_jobs:
                raise QueueFull(
                    f"queue {queue} holds {num_queued} jobs; the limit is {self.max_queued_jobs}"
                )

    def _states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        states: dict[str, JobState] = {}
        for start in range(0, len(job_ids), MAX_STATES_PER_READ):
            some = job_ids[start : start + MAX_STATES_PER_READ]
            with self._redis_errors(), self.redis.pipeline(transaction=True) as pipeline:
                for job_id in some:
                    for command in state_commands(job_id):
                        pipeline.execute_command(*command)
                states |= read_states(some, pipeline.execute())
        return states

    def _block(self, states: dict[str, JobState], deadline: _Deadline) -> None:
        """Until one of the jobs has a new result, a second at the most."""
        block_s = deadline.next_block_s(", ".join(islice(states, 3)))
        streams: dict[Any, Any] = {
            results_key(job_id): state.entry_id or "0-0" for job_id, state in states.items()
        }
        with self._redis_errors():
            self.redis.xread(streams, count=1, block=max(1, int(block_s * 1000)))

    def _read_stream(
        self, job_id: str, last_id: str, state: JobState, deadline: _Deadline
    ) -> list[Any]:
        streams: dict[Any, Any] = {
            stream_key(job_id): last_id,
            results_key(job_id): state.entry_id or "0-0",
        }
        block_ms = None if state.is_final else max(1, int(deadline.next_block_s(job_id) * 1000))
        with self._redis_errors():
            replies: Any = self.redis.xread(streams, block=block_ms)
        return list(dict(replies or {}).get(stream_key(job_id).encode(), []))

    @contextmanager
    def _redis_errors(self) -> Iterator[None]:
        with redis_errors(self.redis_url):
            yield


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn redis-py's errors into Shoal's.

    Raises:
        QueueFull: Redis is out of memory. RedisUnavailable: it does not answer.
    """
    try:
        yield
    except redis.OutOfMemoryError:
        raise QueueFull(
            f"Redis at {redacted(url)} is out of memory and takes no more; wait for workers to "
            "catch up, or raise its maxmemory"
        ) from None
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise RedisUnavailable(f"Redis at {redacted(url)} does not answer: {error}") from None


class _Deadline:
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
