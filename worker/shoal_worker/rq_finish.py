"""Ends one claimed job through RQ's own functions, and only if it is still ours.

For ends that no fixed list of commands describes: jobs that depend on this one, a repeat or a retry
to schedule, callbacks, webhooks, the slot of a rate limit. What these functions write goes through
a `Fence`. They get copies of the worker and of the job, so that an end can be tried again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rq import Queue, Retry
from rq.callbacks import (
    execute_failure_callback,
    execute_stopped_callback,
    execute_success_callback,
)
from rq.job import JobStatus
from rq.job_lifecycle import format_exc_info
from rq.registry import ReadyJobRegistry
from rq.worker.base import BaseWorker

from shoal_worker.rq_fence import SERVER_TROUBLE, Fence, Halt
from shoal_worker.rq_outcomes import (
    Claimed,
    Failed,
    GivenBack,
    Outcome,
    Stopped,
    Succeeded,
    Superseded,
)
from shoal_worker.rq_private import (
    STOPPED_REASON,
    Command,
    ending_job,
    ending_worker,
    has_callbacks,
    mark_ended,
)

log = logging.getLogger("shoal.worker")


def needs_rq(outcome: Outcome, *, callbacks: bool = False) -> bool:
    """Whether this end is one for RQ's functions, as far as the job itself can tell.

    Other jobs that depend on it are in Redis, and may come at any time: the commit script looks.

    Args:
        callbacks: callbacks and webhooks are run.
    """
    job = outcome.claimed.job
    if isinstance(outcome, GivenBack | Superseded):
        return False
    if job.has_rate_limit or (callbacks and has_callbacks(job)):
        return True
    match outcome:
        case Succeeded(return_value=value):
            return bool(job.repeats_left) or isinstance(value, Retry)
        case Failed(may_retry=may_retry, error=error):
            # An error that was raised here is told to the worker's exception handlers.
            return error is not None or (may_retry and job.should_retry)
        case Stopped():
            return False


def finish_through_rq(
    worker: BaseWorker,
    outcome: Outcome,
    along: Sequence[Command] = (),
    *,
    callbacks: bool = False,
) -> bool:
    """End a job as RQ's own worker would; False if it is not ours any more and nothing was written.

    May be called again with the same outcome when Redis did not answer: what was written by the
    first call is not written again. Only a callback then runs a second time.

    Args:
        along: commands that join RQ's transaction: they run if and only if it does.
        callbacks: run the job's callbacks here, and send its webhooks.
    """
    finish = _Finish(worker, outcome.claimed, along, callbacks=callbacks)
    match outcome:
        case Succeeded(return_value=value):
            return finish.run(lambda: finish.success(value))
        case Failed(reason=reason, may_retry=may_retry, error=error):
            return finish.run(lambda: finish.failure(reason, error, may_retry=may_retry))
        case Stopped():
            return finish.run(finish.stopped)
        case GivenBack() | Superseded():
            raise AssertionError("a job that goes on elsewhere is not ended")


def enqueue_ready(worker: BaseWorker) -> None:
    """Enqueue what is ready in our queues: left by a worker that died between a job's end and that.

    An end marks the job's dependents as ready in its own transaction; they enter their queues after
    it, each in a transaction that looks whether it is still waiting there.
    """
    _enqueue_ready(worker, [queue.name for queue in worker.queues])


class _Finish:
    """One attempt to end one job: the job, worker and queue that RQ's functions are called with."""

    def __init__(
        self, worker: BaseWorker, claimed: Claimed, along: Sequence[Command], *, callbacks: bool
    ) -> None:
        self._worker = worker
        self._claimed = claimed
        self._callbacks = callbacks
        self._job = ending_job(claimed.job, sends_webhooks=callbacks)
        self._queue: Queue = worker.queue_class(
            claimed.queue,
            connection=worker.connection,
            job_class=worker.job_class,
            serializer=worker.serializer,
            death_penalty_class=worker.death_penalty_class,
        )
        self._fence = Fence(self._job, claimed.execution, self._queue, along)
        self._rq = ending_worker(worker, self._fence.connection)

    def run(self, end: Callable[[], None]) -> bool:
        """Whether `end` ended the job, now or in an earlier attempt whose reply was lost."""
        try:
            end()
        except Halt as halt:
            if halt.error is not None:
                raise halt.error from None
            return self._ended_earlier()
        return True

    def success(self, return_value: object) -> None:
        """What RQ does when a job returned this."""
        mark_ended(self._job, JobStatus.FINISHED, return_value)
        try:
            if isinstance(return_value, Retry):
                self._rq.handle_job_retry(
                    self._job,
                    self._queue,
                    return_value,
                    self._queue.started_job_registry,
                    self._claimed.execution,
                )
                return
            if self._runs_callbacks():
                execute_success_callback(self._job, self._rq.death_penalty_class, return_value)
            self._rq.handle_job_success(
                self._job, self._queue, self._queue.started_job_registry, self._claimed.execution
            )
            self._job.send_webhooks(JobStatus.FINISHED)
        except SERVER_TROUBLE:
            raise
        except Exception as error:  # noqa: BLE001
            # As in RQ: a failing callback, or whatever trips RQ, fails the job. It must end.
            self._job = self._fence.job = ending_job(
                self._claimed.job, sends_webhooks=self._callbacks
            )
            self.failure(format_exc_info(_exc_info(error)), error, may_retry=True)

    def failure(self, reason: str, error: BaseException | None, *, may_retry: bool) -> None:
        """What RQ does when a job raised `error`; `reason` is what it keeps of it."""
        mark_ended(self._job, JobStatus.FAILED)
        if not may_retry:
            self._job.retries_left = None
        if self._runs_callbacks():
            try:
                raised = _exc_info(error or RuntimeError(reason))
                execute_failure_callback(self._job, self._rq.death_penalty_class, *raised)
            except Exception as of_callback:  # noqa: BLE001
                # As in RQ: it replaces the job's own.
                error, reason = of_callback, format_exc_info(sys.exc_info())
        if error is not None:
            self._rq.handle_exception(self._job, *_exc_info(error))
        self._write_failure(reason)

    def stopped(self) -> None:
        """What RQ does when somebody stopped a job."""
        if self._runs_callbacks():
            try:
                execute_stopped_callback(self._job, self._rq.death_penalty_class)
            except Exception:
                log.exception("the stopped callback of job %s failed", self._job.id)
        self._rq = ending_worker(self._worker, self._fence.connection, stopped_job_id=self._job.id)
        self._write_failure(STOPPED_REASON)

    def _write_failure(self, reason: str) -> None:
        self._rq.handle_job_failure(
            self._job, self._queue, exc_string=reason, execution=self._claimed.execution
        )
        _enqueue_ready(self._worker, self._fence.ready_queues)

    def _runs_callbacks(self) -> bool:
        if self._callbacks:
            # Not for a job that is not ours, as far as one can know before the transaction.
            self._fence.check(self._worker.connection)
        return self._callbacks

    def _ended_earlier(self) -> bool:
        enqueue_ready(self._worker)
        _enqueue_ready(self._worker, self._fence.ready_queues)
        latest = self._job.latest_result()
        return latest is not None and latest.execution_id == self._claimed.execution.id


def _exc_info(error: BaseException) -> tuple[Any, Any, Any]:
    return type(error), error, error.__traceback__


def _enqueue_ready(worker: BaseWorker, queue_names: Iterable[str]) -> None:
    for name in queue_names:
        registry = ReadyJobRegistry(
            name,
            connection=worker.connection,
            job_class=worker.job_class,
            serializer=worker.serializer,
        )
        try:
            registry.cleanup()
        except SERVER_TROUBLE:
            raise
        except Exception:
            # A hash that RQ cannot read must not end the worker.
            log.exception("jobs that are ready stay out of the queue %s", name)
