"""The life of many RQ jobs in one worker: claim, lease, commit, give back, recover.

Owns every exchange with Redis on behalf of a job. It knows nothing of text generation: what a job
does is somebody else's, and reaches this module as an outcome. What RQ writes at a job's end is
written by RQ's own code (see `rq_private`), run by a script only if the job is still ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any, Literal

from redis import Redis
from rq import Queue
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import DeserializationError
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import utcformat

from shoal.jobs import EXPIRIES_KEY
from shoal_worker.rq_private import (
    Command,
    RegisteredWorker,
    failure_commands,
    has_callbacks,
    requeue_commands,
    restored_job,
    started_execution,
    success_commands,
    unreadable_commands,
)

log = logging.getLogger("shoal.worker")

LEASES_KEY = f"{RQ_KEY_PREFIX}:shoal:leases"
WIP_AHEAD_S = 3_600  # `rq info` and dashboards reap what RQ's own entry says is overdue.
MAX_JOBS_PER_SCRIPT = 256
MAX_WORKER_DEATHS = 5
DEATHS_FIELD = "shoal_deaths"  # in the job's hash, beside RQ's own fields


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job that is ours: started in RQ's eyes, and under our lease."""

    job: Job
    execution: Execution
    deaths: int = 0  # workers or engines that died while they held it

    @property
    def id(self) -> str:
        """The RQ job's id."""
        return str(self.job.id)

    @property
    def queue(self) -> str:
        """The queue it came from."""
        return str(self.job.origin)


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The job returned this JSON value."""

    claimed: Claimed
    return_value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """The job failed for good, for this reason."""

    claimed: Claimed
    reason: str


@dataclass(frozen=True, slots=True)
class GivenBack:
    """The job goes back to the front of its queue as if it had not been taken."""

    claimed: Claimed


@dataclass(frozen=True, slots=True)
class Abandoned:
    """As `GivenBack`, but what ran it has died: counted, since the job may be the cause."""

    claimed: Claimed


Outcome = Succeeded | Failed | GivenBack | Abandoned


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a lease's renewal said of one job."""

    claimed: Claimed
    state: Literal["held", "cancelled", "lost"]
    cancelled_requests: frozenset[int]


@dataclass(frozen=True, slots=True)
class Recovered:
    """A job found without a living worker, and what was done with it."""

    job_id: str
    queue: str
    failed: bool


class Lifecycle:
    """Claims jobs, holds them, ends them.

    Args:
        worker: our registration with RQ; its queues are claimed from in their order.
        lease_s: a job whose lease is not renewed for so long runs again elsewhere.
    """

    def __init__(self, worker: RegisteredWorker, *, lease_s: float) -> None:
        self.worker = worker
        self.lease_s = lease_s
        self._redis: Redis = worker.connection
        self._claim = self._script("claim")
        self._renew = self._script("renew")
        self._commit = self._script("commit")
        self._recover = self._script("recover")

    def claim(self, max_requests: int) -> list[Claimed]:
        """Take jobs of about `max_requests` requests in all, at most one job over it."""
        now = datetime.now(UTC)
        *claimed, _dropped = self._claim(
            keys=[LEASES_KEY, *self.worker.queue_keys()],
            args=[
                RQ_KEY_PREFIX,
                self.worker.name,
                max_requests,
                MAX_JOBS_PER_SCRIPT,
                self.lease_s,
                WIP_AHEAD_S,
                utcformat(now),
                os.urandom(14).hex(),
            ],
        )
        jobs = []
        for execution_id, job_id, flat in claimed:
            execution = self._execution(execution_id.decode(), job_id.decode(), now)
            fields = _pairs(flat)
            try:
                job = restored_job(job_id.decode(), fields, self._redis, JSONSerializer)
            except Exception as error:  # noqa: BLE001
                # Whatever RQ trips over in a hash that somebody else wrote: one such job must not
                # end the worker, and the next one, and the next.
                self._discard(execution, fields, error)
                continue
            jobs.append(Claimed(job, execution, int(fields.get(DEATHS_FIELD.encode(), 0))))
        return jobs

    def renew(self, claimed: Sequence[Claimed]) -> list[Renewal]:
        """Renew all leases in one round trip, and hear of cancellations in the same."""
        if not claimed:
            return []
        args: list[Any] = [RQ_KEY_PREFIX, self.worker.name, self.lease_s, WIP_AHEAD_S]
        for one in claimed:
            args += [one.id, one.execution.id, one.queue]
        replies = self._renew(keys=[LEASES_KEY], args=args)
        return [
            Renewal(one, state.decode(), frozenset(int(i) for i in indexes if i.isdigit()))
            for one, (state, indexes) in zip(claimed, replies, strict=True)
        ]

    def commit(self, outcomes: Sequence[Outcome]) -> list[bool]:
        """End jobs in one round trip; False for each that was not ours to end any more."""
        if not outcomes:
            return []
        args: list[Any] = [RQ_KEY_PREFIX, self.worker.name]
        for outcome in outcomes:
            claimed, commands = outcome.claimed, self._commands(outcome)
            kept_s = claimed.job.get_result_ttl(0) if isinstance(outcome, Succeeded) else 0
            args += [claimed.id, claimed.execution.id, claimed.queue, kept_s, len(commands)]
            args += [word for command in commands for word in (len(command), *command)]
        committed = [
            bool(reply) for reply in self._commit(keys=[LEASES_KEY, EXPIRIES_KEY], args=args)
        ]
        for outcome, ran in zip(outcomes, committed, strict=True):
            if ran and isinstance(outcome, Succeeded | Failed):
                self._enqueue_dependents(outcome.claimed)
        return committed

    def recover(self) -> list[Recovered]:
        """Put dead workers' jobs back to their queues; end those that keep losing their worker."""
        args = [
            RQ_KEY_PREFIX,
            self.worker.name,
            MAX_JOBS_PER_SCRIPT,
            MAX_WORKER_DEATHS,
            self.lease_s,
        ]
        recovered, condemned = [], []
        for job_id, execution_id, queue, fate in self._recover(keys=[LEASES_KEY], args=args):
            failed = fate == b"condemned"
            recovered.append(Recovered(job_id.decode(), queue.decode(), failed))
            if failed:
                condemned.append(self._condemned(job_id.decode(), execution_id.decode()))
        self.commit(condemned)
        return recovered

    def _condemned(self, job_id: str, execution_id: str) -> Failed:
        job = Job.fetch(job_id, connection=self._redis, serializer=JSONSerializer)
        execution = self._execution(execution_id, job_id, datetime.now(UTC))
        return too_many_deaths(Claimed(job, execution))

    def _discard(self, execution: Execution, fields: dict[bytes, bytes], error: Exception) -> None:
        """Fail a job whose hash RQ cannot read."""
        log.error("job %s cannot be read and is failed: %s", execution.job_id, error)
        queue = fields.get(b"origin", b"").decode(errors="replace")
        commands = unreadable_commands(self.worker, queue, execution)
        args: list[Any] = [RQ_KEY_PREFIX, self.worker.name]
        args += [execution.job_id, execution.id, queue, 0, len(commands)]
        args += [word for command in commands for word in (len(command), *command)]
        self._commit(keys=[LEASES_KEY, EXPIRIES_KEY], args=args)

    def _execution(self, execution_id: str, job_id: str, now: datetime) -> Execution:
        return started_execution(execution_id, job_id, self.worker.name, now, self._redis)

    def _commands(self, outcome: Outcome) -> list[Command]:
        job, execution = outcome.claimed.job, outcome.claimed.execution
        match outcome:
            case Succeeded(return_value=value):
                return success_commands(self.worker, job, execution, value)
            case Failed(reason=reason):
                return failure_commands(self.worker, job, execution, reason)
            case GivenBack():
                return requeue_commands(self.worker, job, execution)
            case Abandoned():
                requeue = requeue_commands(self.worker, job, execution)
                return [*requeue, ("HINCRBY", job.key, DEATHS_FIELD, 1)]

    def _enqueue_dependents(self, claimed: Claimed) -> None:
        if self._redis.exists(claimed.job.dependents_key):
            queue = Queue(claimed.queue, connection=self._redis, serializer=JSONSerializer)
            queue.enqueue_dependents(claimed.job)

    def _script(self, name: str) -> Any:
        source = files("shoal_worker").joinpath("scripts", f"{name}.lua").read_text()
        return self._redis.register_script(source)


def abandoned(claimed: Claimed) -> Outcome:
    """The outcome of a job whose engine died: once more, or the end."""
    if claimed.deaths >= MAX_WORKER_DEATHS:
        return too_many_deaths(claimed)
    return Abandoned(claimed)


def too_many_deaths(claimed: Claimed) -> Failed:
    """The end of a job that has outlived too many workers to be trusted with another."""
    reason = f"what ran it died {MAX_WORKER_DEATHS + 1} times while it held this job"
    return Failed(claimed, reason)


def refusal(claimed: Claimed, function_name: str) -> str | None:
    """Why a claimed job must not run, or None: another function, or names to import."""
    try:
        func_name = claimed.job.func_name
    except DeserializationError:
        return "the job's data is not JSON; enqueue it with RQ's JSONSerializer"
    if func_name != function_name:
        return f"this worker runs {function_name} and nothing else; the job asks for {func_name}"
    if has_callbacks(claimed.job):
        return "callbacks and webhooks are refused: they would run code or send requests from here"
    return None


def _pairs(flat: Iterable[bytes]) -> dict[bytes, bytes]:
    words = list(flat)
    return dict(zip(words[::2], words[1::2], strict=True))
