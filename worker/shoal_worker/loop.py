"""The serving loop: jobs in, one step of the engine at a time, results out.

Owns which requests are in the making and how they end. What can wait, such as writing an answer, is
done while the device works on the next step. It talks to an engine by `prefill`, `decode`
and `release`, to the scheduler, and to a codec for text. It knows no Redis and no RQ: messages come
in by method call and go out as return values, so a worker, a benchmark or a test can drive it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from shoal.errors import InvalidRequest, PromptTooLong
from shoal.validation import parse
from shoal.wire import FinishReason, GenerationJob
from shoal_worker.answers import Answers, OpenJob, OpenRequest, request_ended
from shoal_worker.events import EngineState, Event
from shoal_worker.lanes import LaneSpec
from shoal_worker.messages import FromEngine, JobRefused, Observed, Submit, TextDelta
from shoal_worker.scheduler import Decode, Prefill, Scheduler, Step
from shoal_worker.sequence import SampledToken, Sequence
from shoal_worker.step_observer import StepObserver
from shoal_worker.text import TextCodec, TextStream

STATE_EVERY_S = 1.0

log = logging.getLogger("shoal.engine")


class Engine(Protocol):
    """What the loop needs of an engine: one row of tokens for each row of a step, in its order."""

    @property
    def runs_ahead(self) -> bool:
        """Whether its device works on after a call has returned."""
        ...

    def prefill(self, step: Prefill) -> list[list[SampledToken]]:
        """Read the rows' prompts; each row's first token."""
        ...

    def decode(self, step: Decode, meanwhile: Callable[[], bool] = ...) -> list[list[SampledToken]]:
        """Each row's next token, or next few.

        Args:
            meanwhile: called again and again where it would wait for its device; false where there
                is nothing left to do.
        """
        ...

    def take_spent(self, lane: LaneSpec) -> list[int]:
        """Slots that are free though their last tokens are still to be read."""
        ...

    def release(self, lane: LaneSpec, slot: int) -> None:
        """The slot's row has ended."""
        ...


class ServingLoop:
    """Runs jobs to their results.

    Args:
        model_name: the name in results; a request for another model is refused.
        fingerprint: goes into every result.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        codec: TextCodec,
        *,
        model_name: str,
        fingerprint: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._codec = codec
        self._answers = Answers(model_name, fingerprint)
        self._observer = StepObserver()
        self._clock = clock
        self._jobs: dict[str, OpenJob] = {}
        self._arriving: dict[str, Submit] = {}
        self._arrivals: deque[tuple[Submit, float]] = deque()
        self._ended: deque[Sequence] = deque()
        self._streams: dict[Sequence, TextStream] = {}
        self._outbox: list[FromEngine] = []
        self._events: list[Event] = []
        self._state_sent_s = float("-inf")

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in the making."""
        return self._scheduler.is_idle and not (self._arrivals or self._ended)

    def declare_shapes(self) -> None:
        """All shapes of the table have been warmed up: any other is a miss."""
        self._observer.declare(self._scheduler.table)

    def submit(self, message: Submit) -> None:
        """Take a job in; requests that cannot run have their result without a step."""
        # Claimed again after a lost lease: what is left of the first attempt goes.
        self.cancel(message.job_id, None)
        self._arriving[message.job_id] = message
        if self._engine.runs_ahead and self._scheduler.num_running:
            self._arrivals.append((message, self._clock()))
        else:
            self._take_in(message, self._clock())

    def cancel(self, job_id: str, index: int | None) -> None:
        """Stop one request, which then has an error for a result, or a whole job without any."""
        if job_id in self._arriving:
            if index is None:
                del self._arriving[job_id]
            else:
                self._take_in(self._arriving[job_id], self._clock())
        if job_id not in self._jobs:
            return
        requests = self._jobs[job_id].requests
        if index is None:
            for request in requests.values():
                self._abort(request)
            del self._jobs[job_id]
        elif index in requests and requests[index].result is None:
            self._abort(requests[index])
            self._answer_error(job_id, requests[index], "cancelled", "cancelled by its sender")
            self._finish_job_if_done(job_id)

    def step(self) -> list[FromEngine]:
        """Run one step, if there is one, and hand out what is to be told since the last call."""
        now_s = self._clock()
        for sequence in self._scheduler.overdue(now_s):
            self._end(sequence, "deadline")
            self._advance_text(sequence)
            self._conclude(sequence)
        step = self._scheduler.schedule()
        if step is not None:
            self._run(step)
        if step is None or not self._engine.runs_ahead:
            self._catch_up(num_unanswered=0)
        self._report_state()
        outbox, self._outbox = self._outbox, []
        events, self._events = self._events, []
        return [*outbox, Observed(tuple(events))] if events else outbox

    def _do_what_can_wait(self) -> bool:
        """Take a job in or answer a sequence; whether there was any."""
        if self._arrivals:
            self._take_in(*self._arrivals.popleft())
        elif self._ended:
            self._conclude(self._ended.popleft())
        else:
            return False
        return True

    def _catch_up(self, num_unanswered: int) -> None:
        """Take all jobs in, and leave so many sequences at most that have ended unanswered."""
        while self._arrivals or len(self._ended) > num_unanswered:
            self._do_what_can_wait()

    def _take_in(self, message: Submit, arrival_s: float) -> None:
        if self._arriving.get(message.job_id) is not message:
            return  # Cancelled meanwhile.
        del self._arriving[message.job_id]
        try:
            job = parse(GenerationJob, message.job)
        except InvalidRequest as error:
            self._refuse(message, f"not a GenerationJob: {error}")
            return
        except RecursionError:
            self._refuse(message, "the job's argument is nested too deeply")
            return
        self._jobs[message.job_id] = OpenJob.of(message, job, arrival_s)
        for index, request in self._jobs[message.job_id].requests.items():
            self._admit(message, index, request)
        self._finish_job_if_done(message.job_id)

    def _refuse(self, message: Submit, reason: str) -> None:
        self._outbox.append(JobRefused(message.job_id, reason, message.execution_id))

    def _admit(self, message: Submit, index: int, request: OpenRequest) -> None:
        wanted, served = request.request.model, self._answers.model_name
        if wanted is not None and wanted != served:
            text = f"the request is for model {wanted!r}; this worker serves {served!r}"
            self._answer_error(message.job_id, request, "model_mismatch", text)
            return
        try:
            sequences = self._codec.sequences(
                request.request,
                message.job_id,
                index,
                now_s=request.arrival_s,
                priority=message.priority,
            )
        except InvalidRequest as error:
            code = "prompt_too_long" if isinstance(error, PromptTooLong) else "invalid_request"
            self._answer_error(message.job_id, request, code, str(error))
            return
        except Exception as error:  # noqa: BLE001
            # The edge of admission: whatever a tokenizer trips over in one prompt concerns nobody
            # else. The prompt stays out of the log.
            kind = type(error).__name__
            log.error("request %d of job %s is not tokenised: %s", index, message.job_id, kind)
            text = f"the request could not be tokenised: {kind}"
            self._answer_error(message.job_id, request, "internal_error", text)
            return
        if request.request.count_only:
            request.result = self._answers.counted(request, sequences)
            return
        request.sequences = sequences
        for sequence in sequences:
            sequence.queue = message.queue
            if sequence.deadline_s is not None:
                sequence.deadline_s -= message.queued_s
            if sequence.sampling.stop or message.streams:
                self._streams[sequence] = TextStream(self._codec, sequence)
            self._scheduler.add(sequence)

    def _run(self, step: Step) -> None:
        started_s, num_ended = self._clock(), len(self._ended)
        if isinstance(step, Prefill):
            for row in step.rows:
                self._prefill_starts(row.sequence, started_s)
            tokens = self._engine.prefill(step)
        else:
            tokens = self._engine.decode(step, self._do_what_can_wait)
        for slot in self._engine.take_spent(step.lane):
            self._scheduler.hand_over(step.lane, slot)
        self._take_tokens(step, tokens, started_s)
        # An eighth at least, also where the device never waits for us; a thousand that end together
        # would keep it from its next step.
        self._catch_up(num_unanswered=num_ended * 7 // 8)
        for sequence in step.sequences:
            if not sequence.is_finished:
                continue
            if self._engine.runs_ahead and step.lane.service_class == "bulk":
                self._ended.append(sequence)
            else:
                self._conclude(sequence)

    def _take_tokens(self, step: Step, tokens: list[list[SampledToken]], started_s: float) -> None:
        ended_s = self._clock()
        sequences = step.sequences
        slots = {sequence: sequence.slot for sequence in sequences}
        before = [len(sequence.output_token_ids) for sequence in sequences]
        for sequence in self._scheduler.update(step, tokens, ended_s):
            if (slot := slots[sequence]) is not None:
                self._engine.release(step.lane, slot)
        if self._streams:
            for sequence in sequences:
                self._advance_text(sequence)
        # A sequence's first token is its prefill's, whenever it is read.
        num_firsts = [int(not had and bool(new)) for had, new in zip(before, tokens, strict=True)]
        num_passes = map(int.__sub__, map(len, tokens), num_firsts)
        event = self._observer.observe(
            step,
            new_tokens=_new_tokens_by_queue(sequences, before),
            num_first_tokens=sum(num_firsts),
            num_passes=max(num_passes, default=1),
            started_s=started_s,
            ended_s=ended_s,
        )
        self._events.append(event)

    def _prefill_starts(self, sequence: Sequence, now_s: float) -> None:
        sequence.prefill_started_s = now_s
        limit_s = self._jobs[sequence.key.job_id].message.limit_s
        if limit_s is not None:
            before_s = sequence.deadline_s
            ends_s = now_s + limit_s
            sequence.deadline_s = ends_s if before_s is None else min(before_s, ends_s)

    def _advance_text(self, sequence: Sequence) -> None:
        stream = self._streams.get(sequence)
        if stream is None:
            return
        stream.advance()
        if stream.stopped:
            sequence.truncate(stream.num_tokens)
            if sequence.is_finished:
                sequence.finish_reason = "stop"
            else:
                self._end(sequence, "stop")
        job = self._jobs[sequence.key.job_id]
        is_first = sequence.key.request_index == 0 and sequence.key.sample == 0
        at = stream.num_emitted
        if job.message.streams and is_first and (text := stream.take()):
            self._outbox.append(TextDelta(sequence.key.job_id, text, at))

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        lane = next(lane for lane in self._scheduler.table.lanes if lane.name == sequence.lane)
        slot = sequence.slot
        self._scheduler.finish(sequence, reason, self._clock())
        if slot is not None:
            self._engine.release(lane, slot)

    def _abort(self, request: OpenRequest) -> None:
        for sequence in request.sequences:
            if not sequence.is_finished:
                self._end(sequence, "abort")
            self._streams.pop(sequence, None)

    def _conclude(self, sequence: Sequence) -> None:
        """A sequence has ended: answer its request if it was the last one."""
        job_id, index, _sample = sequence.key
        job = self._jobs.get(job_id)
        if job is None:
            return  # A sample that ended in the same step has concluded it.
        request = job.requests.get(index)
        if request is None or sequence not in request.sequences:
            return  # It was an earlier job's of the same id.
        if request.result is not None or not request.is_generated:
            return
        if not request.has_tokens:
            deadline_s = request.request.deadline
            text = f"the deadline of {deadline_s:g} s passed before generation began"
            self._answer_error(job_id, request, "expired", text)
        else:
            self._answer(job_id, request)
        self._finish_job_if_done(job_id)

    def _answer(self, job_id: str, request: OpenRequest) -> None:
        completions = []
        for sequence in request.sequences:
            stream = self._streams.pop(sequence, None)
            completions.append(self._codec.completion(sequence, stream.text if stream else None))
        message = self._jobs[job_id].message
        request.result = self._answers.result(request, completions, message.queued_s)
        self._events.append(request_ended(message, request, self._clock()))

    def _answer_error(
        self, job_id: str, request: OpenRequest, code: str, text: str, *, retryable: bool = False
    ) -> None:
        for sequence in request.sequences:
            self._streams.pop(sequence, None)
        request.result = self._answers.error(request, code, text, retryable=retryable)
        self._events.append(request_ended(self._jobs[job_id].message, request, self._clock()))

    def _finish_job_if_done(self, job_id: str) -> None:
        done = self._jobs[job_id].done()
        if done is not None:
            del self._jobs[job_id]
            self._outbox.append(done)

    def _report_state(self) -> None:
        now_s = self._clock()
        if not self.is_idle and now_s - self._state_sent_s < STATE_EVERY_S:
            return
        self._state_sent_s = now_s
        self._events.append(
            EngineState(
                requests_running=self._scheduler.num_running,
                requests_waiting=self._scheduler.num_waiting,
                slots_in_use=self._scheduler.slots_in_use(),
                kv_usage_ratio=self._scheduler.kv_usage_ratio(),
                shape_cache_misses=self._observer.num_shape_misses,
            )
        )


def _new_tokens_by_queue(sequences: Iterable[Sequence], before: list[int]) -> dict[str, int]:
    """Tokens that these have made since they had `before`."""
    made: dict[str, int] = {}
    for sequence, num_before in zip(sequences, before, strict=True):
        new = len(sequence.output_token_ids) - num_before
        made[sequence.queue] = made.get(sequence.queue, 0) + new
    return made
