"""What jobs are answered with: the result or the error of each request, and the event of its end.

Owns jobs and requests in the making and how they become results. Pure: it knows no engine, no
scheduler and no clock; times are seconds handed in by the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.wire import (
    Completion,
    GenerationJob,
    GenerationRequest,
    GenerationResult,
    JobResult,
    ResultError,
    Timing,
    Usage,
)
from shoal_worker.events import RequestEnded
from shoal_worker.messages import JobDone, Submit
from shoal_worker.sequence import Sequence


@dataclass(slots=True)
class OpenRequest:
    """One request in the making, and its result once it has one."""

    request: GenerationRequest
    id: str
    arrival_s: float
    sequences: list[Sequence] = field(default_factory=list)
    result: GenerationResult | None = None

    @property
    def is_generated(self) -> bool:
        """Whether all of its sequences have ended."""
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def has_tokens(self) -> bool:
        """Whether anything was generated for it."""
        return any(sequence.output_token_ids for sequence in self.sequences)


@dataclass(slots=True)
class OpenJob:
    """One job in the making. Invariant: it leaves when its last request has a result.

    Attributes:
        requests: those that are to be run, by their place in the job.
    """

    message: Submit
    requests: dict[int, OpenRequest]
    # Backwards, without those at the end that have their result: nobody counts all of them again.
    _open: list[OpenRequest] = field(init=False)

    def __post_init__(self) -> None:
        self._open = list(self.requests.values())[::-1]

    @classmethod
    def of(cls, message: Submit, job: GenerationJob, now_s: float) -> OpenJob:
        """A job that has just come, none of its requests begun."""
        one = len(job.requests) == 1
        requests = {}
        for index, request in enumerate(job.requests):
            if message.indexes is None or index in message.indexes:
                own_id = message.job_id if one else f"{message.job_id}:{index}"
                requests[index] = OpenRequest(request, request.id or own_id, now_s)
        return cls(message, requests)

    def done(self) -> JobDone | None:
        """The job's answer, once every request has its result."""
        while self._open and self._open[-1].result is not None:
            self._open.pop()
        if self._open:
            return None
        results = [request.result for request in self.requests.values()]
        done = [result for result in results if result is not None]
        result = JobResult(results=done).model_dump(mode="json")
        message = self.message
        return JobDone(message.job_id, result, message.indexes, message.execution_id)


@dataclass(frozen=True, slots=True)
class Answers:
    """Writes results in the name of one served model."""

    model_name: str
    fingerprint: str

    def result(
        self, request: OpenRequest, completions: list[Completion], queued_s: float
    ) -> GenerationResult:
        """The result of a request that has generated something.

        Args:
            queued_s: seconds from its submission to its arrival here.
        """
        return GenerationResult(
            id=request.id,
            completions=completions,
            usage=Usage(
                prompt_tokens=len(request.sequences[0].prompt_token_ids),
                completion_tokens=sum(len(completion.token_ids) for completion in completions),
            ),
            model=self.model_name,
            fingerprint=self.fingerprint,
            timing=_timing(request, queued_s),
            truncated_tokens=request.sequences[0].truncated_tokens,
        )

    def counted(self, request: OpenRequest, sequences: list[Sequence]) -> GenerationResult:
        """The result of a request that only asked how many tokens it has: nothing generated."""
        return GenerationResult(
            id=request.id,
            completions=[
                Completion(index=s.key.sample, text="", token_ids=[], finish_reason="length")
                for s in sequences
            ],
            usage=Usage(prompt_tokens=len(sequences[0].prompt_token_ids), completion_tokens=0),
            model=self.model_name,
            fingerprint=self.fingerprint,
            truncated_tokens=sequences[0].truncated_tokens,
        )

    def error(
        self, request: OpenRequest, code: str, text: str, *, retryable: bool
    ) -> GenerationResult:
        """The result of a request that has no completion."""
        return GenerationResult(
            id=request.id,
            model=self.model_name,
            fingerprint=self.fingerprint,
            error=ResultError(code=code, message=text, retryable=retryable),
        )


def request_ended(message: Submit, request: OpenRequest, now_s: float) -> RequestEnded:
    """The event of a request that has just been given its result."""
    result = request.result
    assert result is not None, "a request ends with its result"
    first_s = [s.first_token_s for s in request.sequences if s.first_token_s is not None]
    waited_s = message.queued_s - request.arrival_s
    return RequestEnded(
        queue=message.queue,
        finish_reasons=tuple(c.finish_reason for c in result.completions),
        error_code=result.error.code if result.error else None,
        job_id=message.job_id,
        prompt_tokens=result.usage.prompt_tokens,
        completion_tokens=result.usage.completion_tokens,
        queue_s=result.timing.queue_s,
        prefill_s=result.timing.prefill_s,
        decode_s=result.timing.decode_s,
        ttft_s=waited_s + min(first_s) if first_s else None,
        e2e_s=waited_s + now_s,
    )


def _timing(request: OpenRequest, queued_s: float) -> Timing:
    """From submission to the first prefill; to the first token; to the last one."""
    prefill_s = [s.prefill_started_s for s in request.sequences if s.prefill_started_s is not None]
    first_s = [s.first_token_s for s in request.sequences if s.first_token_s is not None]
    ended_s = [s.finished_s for s in request.sequences if s.finished_s is not None]
    return Timing(
        queue_s=max(0.0, queued_s + min(prefill_s) - request.arrival_s),
        prefill_s=max(0.0, min(first_s) - min(prefill_s)),
        decode_s=max(0.0, max(ended_s) - min(first_s)),
    )
