"""Transactions of RQ's that write for one job, and only while it is ours.

RQ's functions for a job's end open their transaction on their worker's connection. The connection
of a `Fence` hands out transactions that WATCH the job and look whose it is before they write. So
nothing is written for a job that was cancelled, deleted or taken by another worker, and whatever
changes after the look makes them look again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from redis import Redis, WatchError
from redis.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq import Queue
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.registry import ReadyJobRegistry

from shoal_worker.rq_private import Command

# The server's, not the job's: the same may work later.
SERVER_TROUBLE = (RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError)

log = logging.getLogger("shoal.worker")


class Halt(BaseException):
    """Leaves RQ's function at once; RQ logs and swallows every Exception where it writes.

    Attributes:
        error: why nothing was written; None if the job is not ours.
    """

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error


class Fence:
    """Whose the job must be, and what goes into the transaction that ends it.

    Args:
        job: as RQ's functions have it; its status in memory says how it ends.
        queue: the queue it came from.
        along: commands that join the transaction: they run if and only if it does.

    Attributes:
        ready_queues: names of the queues that jobs may enter once the transaction has run.
    """

    def __init__(
        self, job: Job, execution: Execution, queue: Queue, along: Sequence[Command]
    ) -> None:
        self.job = job
        self._execution = execution
        self._queue = queue
        self._along = along
        self.ready_queues: set[str] = set()
        self.connection = _FencedConnection(self, queue.connection)

    def check(self, connection: Redis) -> None:
        """Leaves by `Halt` unless the job is ours: started, by this worker, in this execution."""
        status, worker_name = connection.hmget(self.job.key, "status", "worker_name")
        ours = (b"started", self._execution.worker_name.encode())
        registry, composite = self._queue.started_job_registry.key, self._execution.composite_key
        if (status, worker_name) != ours or connection.zscore(registry, composite) is None:
            raise Halt

    def move_dependents(self, pipeline: Pipeline) -> None:
        """Mark as ready, in the same transaction, those for whom a failure will do.

        RQ does it in a second one: a worker that dies between leaves them deferred for ever.
        """
        if self.job.get_status(refresh=False) != JobStatus.FAILED:
            return
        try:
            self._queue.move_dependents_to_ready(
                self.job, pipeline=pipeline, refresh_job_status=False
            )
        except (*SERVER_TROUBLE, WatchError):
            raise
        except Exception:
            # What RQ cannot read must not keep this job from ending.
            log.exception("a job that depends on %s cannot be read", self.job.id)
            pipeline.command_stack = []

    def complete(self, pipeline: Pipeline) -> None:
        """Add what goes along, and note what the whole lets into which queues."""
        for command in self._along:
            pipeline.execute_command(*command)
        prefix = ReadyJobRegistry.key_template.format("")
        for (name, key, *_), _options in pipeline.command_stack:
            if name == "ZADD" and str(key).startswith(prefix):
                self.ready_queues.add(str(key).removeprefix(prefix))


class _FencedConnection(Redis):
    """For RQ's functions, which ask their worker's connection for a transaction."""

    def __init__(self, fence: Fence, connection: Redis) -> None:
        super().__init__(connection_pool=connection.connection_pool)
        self._fence = fence

    def pipeline(self, *_args: Any, **_kwargs: Any) -> Pipeline:
        return _FencedPipeline(self._fence, self)


class _FencedPipeline(Pipeline):
    """RQ's transaction, whether RQ reads under a WATCH of its own first or only writes."""

    def __init__(self, fence: Fence, connection: Redis) -> None:
        pool, callbacks = connection.connection_pool, connection.response_callbacks
        super().__init__(pool, callbacks, transaction=True, shard_hint=None)
        self._fence = fence

    def watch(self, *names: Any) -> Any:
        if self.watching:
            return self.execute_command("WATCH", *names)
        answer = self.execute_command("WATCH", self._fence.job.key, *names)
        self._fence.check(self)
        return answer

    def execute(self, *args: Any, **kwargs: Any) -> list[Any]:
        if not self.watching:
            return self._execute_watched()
        self._fence.complete(self)
        return super().execute(*args, **kwargs)

    def _execute_watched(self) -> list[Any]:
        collected, self.command_stack = self.command_stack, []
        while True:
            try:
                self.watch(self._fence.job.dependents_key)
                self._fence.move_dependents(self)
                if not self.explicit_transaction:
                    self.multi()
                self.command_stack += collected
                return self.execute()
            except WatchError:
                self.reset()
            except Exception as error:
                raise Halt(error) from error
