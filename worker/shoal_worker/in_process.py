"""Requests through a serving loop of this process: all in, step by step, all results out.

Owns the loop between two calls: nothing is in the making then, or it is broken and says so. Knows
neither the engine behind the loop nor a queue.
"""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import FrameType

from shoal.errors import GenerationFailed
from shoal.wire import MAX_REQUESTS_PER_JOB, GenerationRequest, GenerationResult, JobResult
from shoal_worker.events import Subscriber
from shoal_worker.loop import ServingLoop
from shoal_worker.messages import FromEngine, JobDone, JobRefused, Observed, Submit


class InProcess:
    """A serving loop and who drives it.

    Args:
        subscriber: is told of every step and every request's end.
    """

    def __init__(self, loop: ServingLoop, subscriber: Subscriber | None = None) -> None:
        self._loop = loop
        self._subscriber = subscriber
        self._broken_by: str | None = None

    def run(self, requests: Iterable[GenerationRequest]) -> list[GenerationResult]:
        """All results, in the order of the requests; slots refill across all of them.

        Ctrl-C is heard between two steps: what was begun is dropped, and the next call finds
        everything in order. A second one breaks the step off.

        Raises:
            GenerationFailed: an earlier call was broken off in the middle of a step.
        """
        if self._broken_by is not None:
            raise GenerationFailed(
                f"an earlier call was broken off in the middle of a step ({self._broken_by}), so "
                "what the engine holds is not to be trusted: make a new one"
            )
        jobs = list(jobs_of(requests))
        done: dict[str, JobResult] = {}
        with _interrupts_kept() as hear_interrupts:
            for job in jobs:
                self._whole(partial(self._loop.submit, job))
            try:
                while len(done) < len(jobs):
                    hear_interrupts()
                    done |= self._results(self._whole(self._loop.step))
            except BaseException:
                if self._broken_by is None:
                    self._drop(jobs)
                raise
        return [result for job in jobs for result in done[job.job_id].results]

    def _whole(self, part: Callable[[], list[FromEngine] | None]) -> list[FromEngine]:
        """Run a part of the loop that leaves it in disorder unless it runs to its end."""
        try:
            return part() or []
        except BaseException as error:
            self._broken_by = type(error).__name__
            raise

    def _results(self, messages: list[FromEngine]) -> dict[str, JobResult]:
        results = {}
        for message in messages:
            if isinstance(message, JobRefused):
                raise GenerationFailed(message.reason)
            if isinstance(message, JobDone):
                results[message.job_id] = JobResult.model_validate(message.result)
            elif isinstance(message, Observed) and self._subscriber is not None:
                for event in message.events:
                    self._subscriber(event)
        return results

    def _drop(self, jobs: list[Submit]) -> None:
        for job in jobs:
            self._whole(partial(self._loop.cancel, job.job_id, None))
        self._whole(self._loop.step)  # Takes out what it had still to tell.


def jobs_of(requests: Iterable[GenerationRequest]) -> Iterator[Submit]:
    """The requests as the jobs that a queue would bring."""
    rest = iter(requests)
    while group := list(islice(rest, MAX_REQUESTS_PER_JOB)):
        job = {"v": 1, "requests": [request.model_dump() for request in group]}
        yield Submit(uuid.uuid4().hex, "in-process", job, queued_s=0.0, priority=0)


@contextmanager
def _interrupts_kept() -> Iterator[Callable[[], None]]:
    """Within, the first Ctrl-C is kept until the yielded function is called, or to the end."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    kept: list[FrameType | None] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        if kept:
            handler(signum, frame)
        kept.append(frame)

    def hear() -> None:
        if kept:
            handler(signal.SIGINT, kept.pop())

    signal.signal(signal.SIGINT, receive)
    try:
        yield hear
    finally:
        signal.signal(signal.SIGINT, handler)
    hear()
