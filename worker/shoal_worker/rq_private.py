"""Every private name of RQ that Shoal touches, in one place, for one version of RQ.

RQ runs one job at a time; finishing many at once needs a few of its inner steps. What they write is
left to RQ itself: this module calls them on a pipeline that is never executed and hands out the
commands it collected, so that a script can run them behind a check. A contract test compares the
outcome with what RQ's own worker writes.
"""

from __future__ import annotations

import copy
import time
from datetime import datetime
from typing import Any

from redis import Redis
from rq.command import parse_payload
from rq.defaults import DEFAULT_FAILURE_TTL
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.utils import now
from rq.worker.base import BaseWorker

Command = tuple[Any, ...]


class RegisteredWorker(BaseWorker):
    """Our worker as RQ sees it: registered, with heartbeats and counters, found by `rq info`.

    It runs nothing by itself. Commands that arrive on its channel are kept for the caller, because
    they come on RQ's subscriber thread.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands: list[dict[str, Any]] = []

    def _set_connection(self, connection: Redis) -> Redis:
        # RQ would raise the pool's socket time-out to minutes for its blocking reads; ours polls,
        # and a hung Redis must be seen within seconds.
        return connection

    def execute_job(self, job: Job, queue: Any) -> None:
        """Never called: the lifecycle claims and commits instead."""
        raise NotImplementedError

    def handle_payload(self, message: Any) -> None:
        """Keep a command (stop-job, shutdown, ...) for `take_commands`."""
        self.commands.append(parse_payload(message))

    def take_commands(self) -> list[dict[str, Any]]:
        """The commands that arrived since the last call, oldest first."""
        taken, self.commands = self.commands, []
        return taken


def success_commands(
    worker: RegisteredWorker, job: Job, execution: Execution, return_value: object
) -> list[Command]:
    """What RQ writes when this job returns this value."""
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
    worker: RegisteredWorker,
    job: Job,
    execution: Execution,
    reason: str,
    status: JobStatus = JobStatus.FAILED,
) -> list[Command]:
    """What RQ writes when this job fails for good, or is stopped, with this text as its reason."""
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


def requeue_commands(worker: RegisteredWorker, job: Job, execution: Execution) -> list[Command]:
    """What puts a started job back to the front of its queue, as if it had not been taken."""
    with worker.connection.pipeline() as pipeline:
        execution.delete(job=job, pipeline=pipeline)
        job.set_status(JobStatus.QUEUED, pipeline=pipeline)
        pipeline.hset(job.key, mapping={"started_at": "", "worker_name": ""})
        pipeline.lpush(f"rq:queue:{job.origin}", job.id)
        return _collected(pipeline)


def unreadable_commands(
    worker: RegisteredWorker, queue: str, execution: Execution
) -> list[Command]:
    """What puts a job that RQ cannot even read among the failed ones."""
    job = Job(execution.job_id, connection=worker.connection, serializer=worker.serializer)
    job.origin = queue
    with worker.connection.pipeline() as pipeline:
        execution.delete(job=job, pipeline=pipeline)
        job.set_status(JobStatus.FAILED, pipeline=pipeline)
        pipeline.expire(job.key, DEFAULT_FAILURE_TTL)
        pipeline.zadd(job.failed_job_registry.key, {job.id: time.time() + DEFAULT_FAILURE_TTL})
        worker.increment_failed_job_count(pipeline)
        return _collected(pipeline)


def restored_job(
    job_id: str, fields: dict[bytes, bytes], connection: Redis, serializer: Any
) -> Job:
    """A job from its hash as a script returned it."""
    job = Job(job_id, connection=connection, serializer=serializer)
    job.restore(fields)
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


def _count_working_time(worker: RegisteredWorker, job: Job, pipeline: Any) -> None:
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

    ending.set_status = set_status  # type: ignore[method-assign]
    if not sends_webhooks:
        ending.webhooks = []
    return ending


def mark_ended(job: Job, status: JobStatus, return_value: object = None) -> None:
    """Tell a job in memory how it ended, as callbacks and what RQ writes will have it."""
    job._status = status
    job._result = return_value
