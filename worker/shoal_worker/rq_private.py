"""Every private name of RQ that Shoal touches, in one place, for one version of RQ.

RQ runs one job at a time; finishing many at once needs a few of its inner steps. What they write is
left to RQ itself: this module calls them on a pipeline that is never executed and hands out the
commands it collected, so that a script can run them behind a check. A contract test compares the
outcome with what RQ's own worker writes.
"""

from __future__ import annotations

import copy
import logging
import time
from datetime import datetime
from queue import Empty, SimpleQueue
from typing import Any

from redis import Redis
from rq import Queue
from rq.command import parse_payload
from rq.defaults import DEFAULT_FAILURE_TTL, RQ_KEY_PREFIX
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.utils import now
from rq.worker.base import BaseWorker

from shoal_worker.rq_outcomes import Claimed, DeadLetter

STOPPED_REASON = "Job stopped by user"

Command = tuple[Any, ...]

log = logging.getLogger("shoal.worker")


class RegisteredWorker(BaseWorker):
    """Our worker as RQ sees it: registered, with heartbeats and counters, found by `rq info`.

    It runs nothing by itself. Commands that arrive on its channel are kept for the caller, because
    they come on RQ's subscriber thread.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._commands: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def _set_connection(self, connection: Redis) -> Redis:
        # RQ would raise the pool's socket time-out to minutes for its blocking reads; ours polls,
        # and a hung Redis must be seen within seconds.
        return connection

    def execute_job(self, job: Job, queue: Any) -> None:
        """Never called: the lifecycle claims and commits instead."""
        raise NotImplementedError

    def handle_payload(self, message: Any) -> None:
        """Keep a command (stop-job, shutdown, ...) for `take_commands`."""
        try:
            payload = parse_payload(message)
        except (ValueError, KeyError, TypeError):
            payload = None
        if isinstance(payload, dict):
            self._commands.put(payload)
        else:
            # Anybody may publish on the channel; RQ's subscriber thread must outlive it.
            log.warning("something that is no command came over this worker's channel")

    def take_commands(self) -> list[dict[str, Any]]:
        """The commands that arrived since the last call, oldest first."""
        taken = []
        try:
            while True:
                taken.append(self._commands.get_nowait())
        except Empty:
            return taken


def success_commands(worker: BaseWorker, claimed: Claimed, return_value: object) -> list[Command]:
    """What RQ writes when this job returns this value."""
    job, execution = claimed.job, claimed.execution
    with worker.connection.pipeline() as pipeline:
        job.ended_at = now()
        job._status = JobStatus.FINISHED
        job._result = return_value
        worker.increment_successful_job_count(pipeline=pipeline)
        _count_working_time(worker, job, pipeline)
        result_ttl = job.get_result_ttl(worker.default_result_ttl)
        if result_ttl != 0:
            job._handle_success(
                result_ttl,
                pipeline=pipeline,
                worker_name=worker.name,
                execution_id=execution.id,
                execution_started_at=execution.created_at,
                execution_ended_at=job.ended_at,
            )
        job.cleanup(result_ttl, pipeline=pipeline, remove_from_queue=False)
        execution.delete(job=job, pipeline=pipeline)
        return _collected(pipeline)


def failure_commands(
    worker: BaseWorker,
    claimed: Claimed,
    reason: str,
    status: JobStatus = JobStatus.FAILED,
) -> list[Command]:
    """What RQ writes when this job fails for good with this text as its reason."""
    job, execution = claimed.job, claimed.execution
    with worker.connection.pipeline() as pipeline:
        job.ended_at = now()
        job.set_status(status, pipeline=pipeline)
        execution.delete(job=job, pipeline=pipeline)
        job._handle_failure(
            reason,
            pipeline=pipeline,
            worker_name=worker.name,
            execution_id=execution.id,
            execution_started_at=execution.created_at,
            execution_ended_at=job.ended_at,
        )
        worker.increment_failed_job_count(pipeline)
        _count_working_time(worker, job, pipeline)
        return _collected(pipeline)


def stopped_commands(worker: BaseWorker, claimed: Claimed) -> list[Command]:
    """What RQ writes when somebody stops this job: a failure by another name."""
    return failure_commands(worker, claimed, STOPPED_REASON, JobStatus.STOPPED)


def dead_letter_commands(worker: BaseWorker, claimed: Claimed, letter: DeadLetter) -> list[Command]:
    """What puts a part of a job among the failed ones as a job of its own, ready to be requeued."""
    of_job = claimed.job
    func_name = of_job.func_name
    assert func_name is not None, "a job that was run has a function"
    job = Job.create(
        func_name,
        args=(letter.argument,),
        connection=worker.connection,
        serializer=worker.serializer,
        id=letter.job_id,
        origin=of_job.origin,
        status=JobStatus.FAILED,
        description=f"{func_name}: dead letter of {of_job.id}",
        timeout=-1,
        result_ttl=of_job.result_ttl,
        failure_ttl=of_job.failure_ttl,
    )
    job.enqueued_at = of_job.enqueued_at
    job.started_at, job.ended_at = of_job.started_at, now()
    with worker.connection.pipeline() as pipeline:
        job.save(pipeline=pipeline)
        job._handle_failure(letter.reason, pipeline=pipeline, worker_name=worker.name)
        return _collected(pipeline)


def requeue_commands(worker: BaseWorker, claimed: Claimed) -> list[Command]:
    """What puts a started job back to the front of its queue, as if it had not been taken."""
    job = claimed.job
    with worker.connection.pipeline() as pipeline:
        claimed.execution.delete(job=job, pipeline=pipeline)
        job.set_status(JobStatus.QUEUED, pipeline=pipeline)
        pipeline.hset(job.key, mapping={"started_at": "", "worker_name": ""})
        pipeline.lpush(Queue.redis_queue_namespace_prefix + job.origin, job.id)
        if job.ttl:  # Seconds that it may wait; the claim has taken its expiry away.
            job.cleanup(job.ttl, pipeline=pipeline)
        return _collected(pipeline)


def unreadable_commands(
    worker: BaseWorker, queue: bytes, job_id: bytes, execution_id: bytes
) -> list[Command]:
    """What puts a job that RQ cannot even read, be it for its id, among the failed ones."""
    prefix, composite = RQ_KEY_PREFIX.encode(), job_id + b":" + execution_id
    key = prefix + b":job:" + job_id
    ttl = DEFAULT_FAILURE_TTL
    return [
        ("DEL", prefix + b":execution:" + composite),
        ("ZREM", prefix + b":wip:" + queue, composite),
        ("ZREM", prefix + b":executions:" + job_id, execution_id),
        ("SREM", f"{worker.key}:executions", composite),
        ("HSET", key, "status", JobStatus.FAILED.value),
        ("EXPIRE", key, ttl),
        ("ZADD", prefix + b":failed:" + queue, time.time() + ttl, job_id),
        ("HINCRBY", worker.key, "failed_job_count", 1),
    ]


def restored_job(worker: BaseWorker, job_id: str, fields: dict[bytes, bytes]) -> Job:
    """A job from its hash as a script returned it, as its worker reads jobs."""
    job: Job = worker.job_class(job_id, connection=worker.connection, serializer=worker.serializer)
    job.restore(fields)
    return job


def fetched_job(worker: BaseWorker, job_id: str) -> Job:
    """A job from Redis, as its worker reads jobs."""
    job: Job = worker.job_class.fetch(
        job_id, connection=worker.connection, serializer=worker.serializer
    )
    return job


def started_execution(
    execution_id: str, job_id: str, worker_name: str, started_at: datetime, connection: Redis
) -> Execution:
    """The execution that the claim script wrote."""
    execution = Execution(execution_id, job_id, connection, worker_name=worker_name)
    execution.created_at = execution.last_heartbeat = started_at
    return execution


def has_callbacks(job: Job) -> bool:
    """Whether finishing this job would run names, or send HTTP, that it brought along."""
    names = (job._success_callback_name, job._failure_callback_name, job._stopped_callback_name)
    return any(isinstance(name, str) and name for name in names) or bool(job.webhooks)


def _count_working_time(worker: BaseWorker, job: Job, pipeline: Any) -> None:
    if job.started_at and job.ended_at:
        worker.increment_total_working_time(job.ended_at - job.started_at, pipeline)


def _collected(pipeline: Any) -> list[Command]:
    commands = [tuple(args) for args, _options in pipeline.command_stack]
    pipeline.reset()
    return commands


def ending_worker(
    worker: BaseWorker, connection: Redis, stopped_job_id: str | None = None
) -> BaseWorker:
    """The same worker with another connection, for RQ's functions that end a job.

    Args:
        stopped_job_id: the job that these functions take for stopped on request.
    """
    # A copy: RQ's subscriber thread and the claims go on using the worker itself.
    ending = copy.copy(worker)
    ending.connection = connection
    ending._stopped_job_id = stopped_job_id
    return ending


def ending_job(job: Job, *, sends_webhooks: bool) -> Job:
    """The same job for RQ's functions that end it, which change it as they go.

    Whatever happens to the copy, the job itself can be ended again from the start.
    """
    ending = copy.copy(job)
    ending.ended_at = ending.last_heartbeat = now()

    def set_status(status: JobStatus, pipeline: Any = None) -> None:
        # A retry after an interval is also marked as scheduled outside of its transaction: killed
        # there, the job would be in no registry. The transaction writes the status anyway.
        if pipeline is None:
            ending._status = status
        else:
            type(ending).set_status(ending, status, pipeline)

    def to_dict(**parts: Any) -> dict[Any, Any]:
        # `set_status` alone writes the status: a callback that saves the job, which has ended in
        # memory by then, would end it in Redis, before the transaction and without the rest.
        fields = type(ending).to_dict(ending, **parts)
        return {name: value for name, value in fields.items() if name != "status"}

    ending.set_status = set_status  # type: ignore[method-assign]
    ending.to_dict = to_dict  # type: ignore[method-assign, assignment]
    if not sends_webhooks:
        ending.webhooks = []
    return ending


def mark_ended(job: Job, status: JobStatus, return_value: object = None) -> None:
    """Tell a job in memory how it ended, as callbacks and what RQ writes will have it."""
    job._status = status
    job._result = return_value
