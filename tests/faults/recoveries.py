"""How long the jobs of a killed or stopped worker wait until somebody runs them again.

Owns the watch over jobs between a fault and their next execution, read from Redis alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import redis

Fault = Literal["worker", "engine", "pause"]


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A job that was in an execution when a fault hit what ran it."""

    job_id: str
    execution_id: str
    fault: Fault
    since_s: float


class Recoveries:
    """Jobs waiting to run again, and how long those waited that do.

    Attributes:
        waited_s: by fault, the seconds until each interrupted job was in another execution, or,
            where the parent kept it, until it had its result.
        num_unharmed: jobs whose commit was already on its way when the worker was hit.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._waiting: list[Interrupted] = []
        self.waited_s: dict[Fault, list[float]] = {"worker": [], "engine": [], "pause": []}
        self.num_unharmed = 0

    def watch(self, fault: Fault, held: Mapping[str, str]) -> None:
        """A fault hits, now, what runs these jobs (execution id by job id)."""
        now_s = time.monotonic()
        self._waiting += [Interrupted(job, run, fault, now_s) for job, run in held.items()]

    def waiting(self, held: Mapping[str, str]) -> bool:
        """Whether one of these executions has not been followed by another yet."""
        return any(held.get(one.job_id) == one.execution_id for one in self._waiting)

    def unfinished(self) -> list[str]:
        """Jobs that still wait, each in words."""
        now_s = time.monotonic()
        return [
            f"job {one.job_id} has waited {now_s - one.since_s:.1f} s after a fault of its "
            f"{one.fault}"
            for one in self._waiting
        ]

    def poll(self) -> None:
        """Look once at all that wait, in one round trip."""
        if not self._waiting:
            return
        with self._client.pipeline(transaction=True) as pipeline:
            for one in self._waiting:
                pipeline.zrange(f"rq:executions:{one.job_id}", 0, -1)
                pipeline.xrevrange(f"rq:results:{one.job_id}", count=1)
            replies = pipeline.execute()
        now_s = time.monotonic()
        looks = zip(self._waiting, replies[::2], replies[1::2], strict=True)
        self._waiting = [
            one for one, runs, entries in looks if not self._note(one, runs, entries, now_s)
        ]

    def _note(self, one: Interrupted, running: Any, entries: Any, now_s: float) -> bool:
        """Whether this job waits no longer."""
        ended_in = entries[0][1].get(b"execution_id", b"").decode() if entries else None
        if ended_in == one.execution_id and one.fault == "worker":
            self.num_unharmed += 1
            return True
        elsewhere = any(execution.decode() != one.execution_id for execution in running)
        if not elsewhere and ended_in is None:
            return False
        self.waited_s[one.fault].append(now_s - one.since_s)
        return True
