"""A request as an RQ job: its options, its keys, and the commands that enqueue it.

Owns the job's options (ids, retries, time-outs, meta) and the packing of requests into jobs. It
builds commands and sends none, so the blocking and the asyncio client share all of it; what becomes
of a job is read in `shoal.job_states`.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from redis import Redis
from rq import Queue, Retry
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job as RQJob
from rq.queue import EnqueueData
from rq.results import Result
from rq.serializers import JSONSerializer

from shoal.errors import InvalidRequest
from shoal.validation import parse
from shoal.wire import (
    FUNCTION_NAME,
    MAX_REQUESTS_PER_JOB,
    QUEUE_DEFAULT,
    GenerationJob,
    GenerationRequest,
    SamplingParams,
)

DEFAULT_RESULT_TTL_S = 86_400
FAILURE_TTL_S = 7 * 86_400
MAX_RETRIES = 3
MAX_PACK_REQUESTS = 32
MAX_PACK_BYTES = 524_288
MAX_INDEX_DIGITS = len(str(MAX_REQUESTS_PER_JOB))
BYTES_PER_TOKEN = 4  # English text in a byte-level BPE; only free capacity is counted with it.

Command = tuple[Any, ...]

# Enqueueing is not idempotent, and a lost reply makes every client send again. So a job's commands
# run only while its hash does not exist: the second sending finds it and does nothing.
# ARGV: the number of a command's words, then the words, and so on.
ENQUEUE_ONCE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local at = 1
while at <= #ARGV do
  local last = at + tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, last))
  at = last + 1
end
return 1
"""

# Of bulk runs: the jobs of each, and how it goes.
RUN_KEY_PREFIX = f"{RQ_KEY_PREFIX}:shoal:bulk"

# When each result goes, or went: the worker notes it, and keeps the note for a day longer.
EXPIRIES_KEY = f"{RQ_KEY_PREFIX}:shoal:expiries"


@dataclass(frozen=True, slots=True)
class Handle:
    """Names one request: the RQ job it travels in and its place there.

    Attributes:
        num_requests: of the whole job; a job of one request has a handle equal to the job's id.
    """

    job_id: str
    index: int = 0
    num_requests: int = 1

    def __str__(self) -> str:
        return self.job_id if self.num_requests == 1 else f"{self.job_id}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Handle:
        """Read `JOB_ID` or `JOB_ID:INDEX`.

        Raises:
            InvalidRequest: it is neither.
        """
        job_id, colon, index = text.partition(":")
        well_formed = job_id.replace("-", "").replace("_", "").isalnum() and job_id.isascii()
        if colon:
            is_number = index.isascii() and index.isdecimal() and len(index) <= MAX_INDEX_DIGITS
            well_formed = well_formed and is_number
        if not well_formed:
            raise InvalidRequest(f"{text!r} is no job id; job ids look like 3f2a or 3f2a:7")
        if not colon:
            return cls(job_id)
        # The exact number does not matter here: over one is what makes the index part of the name.
        return cls(job_id, int(index), num_requests=max(2, int(index) + 1))


@dataclass(frozen=True, slots=True)
class OutgoingJob:
    """A job ready to be enqueued: its id, its requests and the commands that write it."""

    job_id: str
    queue: str
    requests: tuple[GenerationRequest, ...]
    commands: tuple[Command, ...]

    @property
    def key(self) -> str:
        """The key of the job's hash."""
        return RQJob.key_for(self.job_id)

    @property
    def script_args(self) -> list[Any]:
        """The commands as the flat arguments of `ENQUEUE_ONCE`."""
        return script_words(self.commands)

    @property
    def handles(self) -> list[Handle]:
        """One handle a request, in order."""
        return [Handle(self.job_id, i, len(self.requests)) for i in range(len(self.requests))]


def make_request(
    prompt: str | list[int],
    sampling: SamplingParams | None = None,
    *,
    fields: Mapping[str, object] | None = None,
    **options: object,
) -> GenerationRequest:
    """A validated request from a prompt and either a SamplingParams or sampling fields.

    Raises:
        InvalidRequest: a field is unknown, of the wrong type or out of range.
    """
    if sampling is not None and fields:
        names = ", ".join(sorted(fields))
        raise InvalidRequest(f"give sampling or single fields, not both (got sampling and {names})")
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise InvalidRequest(f"sampling is a {type(sampling).__name__}; give a SamplingParams")
    params = sampling or parse(SamplingParams, dict(fields or {}))
    given = {name: value for name, value in options.items() if value is not None}
    return parse(GenerationRequest, {"prompt": prompt, "sampling": params, **given})


def as_requests(
    prompts: Iterable[str | list[int] | GenerationRequest],
    sampling: SamplingParams | None,
    sampling_fields: Mapping[str, object],
) -> Iterator[GenerationRequest]:
    """Requests from prompts that share their sampling; what is a request already stays as it is."""
    for prompt in prompts:
        if isinstance(prompt, GenerationRequest):
            yield prompt
        else:
            yield make_request(prompt, sampling, fields=sampling_fields)


def new_job_id(idempotency_key: str | None = None) -> str:
    """A job id of the producer's own: random, or always the same for one idempotency key."""
    if idempotency_key is None:
        return uuid.uuid4().hex
    return "idem-" + hashlib.sha256(idempotency_key.encode()).hexdigest()[:32]


def outgoing_job(
    requests: Sequence[GenerationRequest],
    *,
    queue: str = QUEUE_DEFAULT,
    job_id: str | None = None,
    result_ttl_s: int = DEFAULT_RESULT_TTL_S,
    stream: bool = False,
    fingerprint: str | None = None,
    queued_ttl_s: int | None = None,
    along: Sequence[Command] = (),
) -> OutgoingJob:
    """The RQ job of these requests, written by RQ's own code into commands not yet sent.

    Args:
        stream: whether the text is also to be told as it is made.
        fingerprint: binds the job to workers of this kind; others leave it in its queue.
        queued_ttl_s: seconds after which it goes if nobody takes it; None: never.
        along: commands that run in the step that enqueues it, and only then.
    """
    if not queue or not queue.isprintable() or queue != queue.strip():
        raise InvalidRequest(f"queue is {queue!r}; give a name such as {QUEUE_DEFAULT}")
    if type(result_ttl_s) is not int or result_ttl_s < 1:
        raise InvalidRequest(f"result_ttl is {result_ttl_s!r}; it is whole seconds, at least 1")
    job_id = job_id or new_job_id()
    job = parse(GenerationJob, {"requests": list(requests)})
    data = Queue.prepare_data(
        FUNCTION_NAME,
        args=({"v": job.v, **job.model_dump(mode="json", exclude_defaults=True)},),
        timeout=-1,  # A deadline is a request's own; RQ's would count the wait in the lane.
        result_ttl=result_ttl_s,
        ttl=queued_ttl_s,
        failure_ttl=FAILURE_TTL_S,
        description=_description(job),  # RQ's default would put the prompt into logs.
        job_id=job_id,
        meta=_meta(job, stream=stream, fingerprint=fingerprint),
        retry=Retry(max=MAX_RETRIES),
    )
    commands = (*_enqueue_commands(queue, data), *along)
    return OutgoingJob(job_id, queue, tuple(job.requests), commands)


def _enqueue_commands(queue_name: str, data: EnqueueData) -> tuple[Command, ...]:
    queue = Queue(queue_name, connection=offline(), serializer=JSONSerializer)
    queue.redis_server_version = (7, 0, 0)  # Else RQ asks the server; enqueueing does not use it.
    pipeline = offline().pipeline()
    queue.enqueue_many([data], pipeline=pipeline)
    return tuple(tuple(args) for args, _options in pipeline.command_stack)


@lru_cache
def offline() -> Redis:
    """A client that never connects: its pipelines only collect what RQ writes."""
    return Redis()


def script_words(commands: Iterable[Command]) -> list[Any]:
    """Commands as flat arguments of a script: each one's number of words, then the words."""
    return [word for command in commands for word in (len(command), *command)]


def pack(
    requests: Iterable[GenerationRequest], max_requests: int = MAX_PACK_REQUESTS
) -> Iterator[list[GenerationRequest]]:
    """Group requests, in order, into jobs of bounded count and size."""
    group: list[GenerationRequest] = []
    num_bytes = 0
    for request in requests:
        size = prompt_bytes(request)
        if group and (len(group) >= max_requests or num_bytes + size > MAX_PACK_BYTES):
            yield group
            group, num_bytes = [], 0
        group.append(request)
        num_bytes += size
    if group:
        yield group


def prompt_bytes(request: GenerationRequest) -> int:
    """The prompt's size: UTF-8 bytes of text, four bytes a token."""
    prompt = request.prompt
    if request.messages:
        return sum(len(message.content.encode()) for message in request.messages)
    return len(prompt.encode()) if isinstance(prompt, str) else BYTES_PER_TOKEN * len(prompt)


def results_key(job_id: str) -> str:
    """The key of a job's result stream."""
    return str(Result.get_key(job_id))


def stream_key(job_id: str) -> str:
    """The key of the stream of text made so far, for a job that asked for it."""
    return f"{RQ_KEY_PREFIX}:shoal:stream:{job_id}"


def cancel_key(job_id: str) -> str:
    """The key of the set of a job's cancelled requests, by index."""
    return f"{RQ_KEY_PREFIX}:shoal:cancel:{job_id}"


def _description(job: GenerationJob) -> str:
    count = len(job.requests)
    return f"{FUNCTION_NAME}: {count} request{'s' if count != 1 else ''}"


def _meta(job: GenerationJob, *, stream: bool, fingerprint: str | None) -> dict[str, Any]:
    """Plain JSON that a claim can read: the job's data itself is compressed."""
    num_tokens = sum(
        prompt_bytes(request) // BYTES_PER_TOKEN + request.sampling.max_tokens * request.sampling.n
        for request in job.requests
    )
    meta: dict[str, Any] = {
        "requests": sum(request.sampling.n for request in job.requests),
        "tokens": num_tokens,
    }
    if stream:
        meta["stream"] = True
    if fingerprint is not None:
        meta["fingerprint"] = fingerprint
    return meta
