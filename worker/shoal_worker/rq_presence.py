"""How the worker shows itself in Redis: RQ's registration, heartbeats, commands, suspension.

What `rq info`, dashboards and `shoal status` read is written here. It knows no jobs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis
from rq.rate_limit import RateLimitRegistry
from rq.serializers import JSONSerializer
from rq.suspension import is_suspended
from rq.worker.base import WorkerStatus
from rq.worker_registration import register

from shoal.errors import ShoalError
from shoal_worker.rq_private import RegisteredWorker

HEARTBEAT_S = 1.0  # What `shoal status` and a bulk run show is as old as that.
SUSPENSION_S = 1.0
CLEAN_S = 600.0
MIN_REDIS = (6, 2)  # 6.2 is the oldest that RQ itself claims safely from.
WORKER_TTL_S = 30  # RQ adds a minute; a dead worker is listed for so long.

log = logging.getLogger("shoal.worker")


class Every:
    """Says at most once in so many seconds that something is due; the first time at once."""

    def __init__(self, period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._period_s = period_s
        self._clock = clock
        self._next_s = float("-inf")

    def reset(self) -> None:
        """Be due at once."""
        self._next_s = float("-inf")

    def is_due(self) -> bool:
        """True if the last True was a period ago."""
        now_s = self._clock()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._period_s
        return True


class Presence:
    """One worker as the rest of the world sees it.

    Args:
        connection: without retries of its own, since the lifecycle shares it through `worker`.
    """

    def __init__(self, queues: tuple[str, ...], name: str, connection: redis.Redis) -> None:
        self.worker = RegisteredWorker(
            list(queues),
            name=name,
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=WORKER_TTL_S,
        )
        self._redis = connection
        self._beat_every = Every(HEARTBEAT_S)
        self._suspension_every = Every(SUSPENSION_S)
        self._clean_every = Every(CLEAN_S)
        self._state = WorkerStatus.STARTED
        self._suspended = False

    @contextmanager
    def registered(self) -> Iterator[float]:
        """Listed by RQ and listening to its commands, until the block ends.

        Yields:
            Seconds for which the server has been up.

        Raises:
            ShoalError: the server is too old, or the name is taken.
        """
        uptime_s = self._checked_server()
        try:
            self.worker.register_birth()
        except ValueError:
            raise ShoalError(
                f"a worker named {self.worker.name} is already there; choose another --name, or "
                f"wait: if it was killed, Redis forgets it within {WORKER_TTL_S + 60} s"
            ) from None
        self.worker.subscribe()
        self.worker.set_state(self._state)
        try:
            yield uptime_s
        finally:
            try:
                try:
                    self.worker.unsubscribe()
                finally:
                    self.worker.register_death()
            except redis.RedisError as error:
                log.error("Redis fails, so RQ forgets this worker by its time: %s", error)

    def _checked_server(self) -> float:
        facts: Any = self._redis.info("server")
        version = str(facts.get("redis_version", ""))
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if numbers < MIN_REDIS:
            least = ".".join(map(str, MIN_REDIS))
            raise ShoalError(
                f"the server is Redis {version}; Shoal needs {least} or later, or Valkey"
            )
        return float(facts.get("uptime_in_seconds", 0))

    def beat(self, state: WorkerStatus, facts: Callable[[], Mapping[Any, Any]]) -> None:
        """Say that we live: when the state changes, and every second.

        Args:
            facts: more fields for the worker's hash, for `shoal status`.
        """
        due = self._beat_every.is_due()
        if not due and state == self._state:
            return
        self._state = state
        with self._redis.pipeline(transaction=False) as pipeline:
            self.worker.heartbeat(pipeline=pipeline)
            self.worker.set_state(state, pipeline=pipeline)
            if fields := dict(facts()):
                pipeline.hset(self.worker.key, mapping=fields)
            pipeline.hexists(self.worker.key, "birth")
            *_, is_registered = pipeline.execute()
        if not is_registered:
            self._register_again()

    def _register_again(self) -> None:
        """Redis has forgotten us: we were away for too long, or it lost its data."""
        log.warning("Redis had forgotten this worker, which is registered again")
        with self._redis.pipeline() as pipeline:
            pipeline.hset(self.worker.key, mapping=self.worker.serialize())
            register(self.worker, pipeline)
            pipeline.execute()

    def is_suspended(self) -> bool:
        """Whether `rq suspend` is in force; as of at most a second ago."""
        if self._suspension_every.is_due():
            self._suspended = bool(is_suspended(self._redis))
        return self._suspended

    def clean_registries(self) -> None:
        """RQ's own housekeeping, now and then, as every RQ worker does."""
        if self._clean_every.is_due():
            # Not the started ones: RQ would run the callbacks that overdue jobs name, and what is
            # overdue is the lease's business.
            for queue in self.worker.queues:
                queue.finished_job_registry.cleanup()
                queue.failed_job_registry.cleanup()
            # Slots of jobs that were cancelled while they ran, or whose worker died at their end.
            for limit in RateLimitRegistry.all(self._redis):
                limit.cleanup()
