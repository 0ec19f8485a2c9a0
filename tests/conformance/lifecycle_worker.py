"""Workers of RQ's that claim and commit through our lifecycle and run jobs in their own process.

They stand where RQ's tests want its Worker and SimpleWorker. What they inherit from these is RQ's
loop around jobs: signals, suspension, commands, maintenance.
"""

from __future__ import annotations

import time
from typing import Any

from rq.job import Job
from rq.job_lifecycle import format_exc_info
from rq.queue import Queue
from rq.timeouts import JobTimeoutException
from rq.worker import SimpleWorker, Worker
from rq.worker.base import BaseWorker, WorkerStatus

from shoal_worker.rq_lifecycle import Lifecycle
from shoal_worker.rq_outcomes import Claimed, Failed, Outcome, Room, Succeeded

POLL_S = 0.01
ROOM = Room(requests=1, tokens=1_000_000)


class ThroughLifecycle(BaseWorker):
    """Runs ordinary functions, one at a time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lifecycle = Lifecycle(self, lease_s=30, callbacks=True)
        self._claimed: dict[str, Claimed] = {}

    def queue_keys(self) -> list[str]:
        """In the order in which they are claimed from now; RQ's strategies change it."""
        return [queue.key for queue in self._ordered_queues]

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """Claim one job; if `timeout` is None, only one that is there now."""
        self.set_state(WorkerStatus.IDLE)
        self.heartbeat()
        idle_since_s = time.monotonic()
        while not (claimed := self._lifecycle.claim(ROOM)):
            idle_s = time.monotonic() - idle_since_s
            if timeout is None or (max_idle_time is not None and idle_s >= max_idle_time):
                return None
            time.sleep(POLL_S)
        [one] = claimed
        self._claimed[one.id] = one
        self.executions[one.execution.id] = one.execution
        queue = next(queue for queue in self.queues if queue.name == one.queue)
        self.reorder_queues(reference_queue=queue)
        return one.job, queue

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run a claimed job and commit what came of it."""
        claimed = self._claimed.pop(job.id, None)
        if claimed is None:
            super().execute_job(job, queue)  # Called by a test, without a claim.
            return
        self.set_state(WorkerStatus.BUSY)
        self._lifecycle.commit([self._outcome(claimed)])
        self.executions.pop(claimed.execution.id, None)
        self.set_state(WorkerStatus.IDLE)

    def _outcome(self, claimed: Claimed) -> Outcome:
        job = claimed.job
        timeout_s = job.timeout or self.queue_class.DEFAULT_TIMEOUT
        try:
            with self.death_penalty_class(timeout_s, JobTimeoutException, job_id=job.id):
                return Succeeded(claimed, job.perform())
        except BaseException as error:  # noqa: BLE001
            # Whatever a function raises is its failure, as in RQ.
            reason = format_exc_info((type(error), error, error.__traceback__))
            return Failed(claimed, reason, may_retry=True, error=error)


class LifecycleSimpleWorker(ThroughLifecycle, SimpleWorker):
    """In the place of RQ's SimpleWorker."""


class LifecycleWorker(ThroughLifecycle, Worker):
    """In the place of RQ's Worker, which runs each job in a fork; this one does not."""
