"""What Redis knows of queues, workers, failures and bulk runs, read as it stands.

Raw reads only: RQ's own registry classes clean up while they count, which fails or retries other
people's jobs. Prompts are never read, nor anything RQ derives from them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from redis import Redis
from rq.defaults import RQ_KEY_PREFIX

from shoal.bulk.run_state import LIST_RUNS, RunState, read_commands, read_state
from shoal.errors import ShoalError
from shoal.job_states import JobState, read_job_result
from shoal.jobs import results_key
from shoal.wire import QUEUES

REGISTRIES = {
    "running": "wip",
    "finished": "finished",
    "failed": "failed",
    "cancelled": "canceled",
    "deferred": "deferred",
    "scheduled": "scheduled",
}
MAX_FAILURES_SHOWN = 5
STALE_S = 10.0  # Twice the interval of a worker's heartbeats.

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class QueueState:
    """One queue: jobs waiting, the age of the one that is next, and its registries' sizes."""

    name: str
    depth: int
    oldest_age_s: float | None
    registries: dict[str, int] = field(default_factory=dict)

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to tell of it."""
        return self.depth == 0 and not any(self.registries.values())


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One registered worker. What only Shoal's own workers tell is None with others.

    Attributes:
        tokens_per_s: lately; busy_tokens_per_s: while it had anything to do.
    """

    name: str
    state: str
    queues: tuple[str, ...]
    hostname: str | None = None
    pid: int | None = None
    heartbeat_age_s: float | None = None
    model: str | None = None
    device: str | None = None
    fingerprint: str | None = None
    slots: int | None = None
    running: int | None = None
    tokens_per_s: float | None = None
    busy_tokens_per_s: float | None = None
    padding_ratio: float | None = None
    tokens: int | None = None
    padding_tokens: int | None = None

    @property
    def is_alive(self) -> bool:
        """Whether its process exists, as far as this machine can tell.

        A killed worker stays registered for minutes; on this machine its process can be looked up,
        unless it still beats: then it is in a container that shares the host's name.
        """
        is_beating = self.heartbeat_age_s is not None and self.heartbeat_age_s < STALE_S
        if is_beating or self.pid is None or self.hostname != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed job and the last line of why."""

    job_id: str
    queue: str
    reason: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of it at one moment."""

    queues: tuple[QueueState, ...]
    workers: tuple[WorkerState, ...]
    failures: tuple[Failure, ...]
    runs: tuple[RunState, ...] = ()


def read_snapshot(redis: Redis) -> Snapshot:
    """Queues (Shoal's own and all that RQ knows), workers, the newest failures and bulk runs."""
    queues, workers, _now_s = read_queues_and_workers(redis)
    failures = read_failures(redis, [queue.name for queue in queues])
    return Snapshot(queues, workers, tuple(failures), tuple(read_runs(redis)))


def read_queues_and_workers(
    redis: Redis,
) -> tuple[tuple[QueueState, ...], tuple[WorkerState, ...], float]:
    """Queues and workers, and the server's clock by which their ages are."""
    now_s = _redis_time_s(redis)
    queues = read_queues(redis, read_queue_names(redis), now_s)
    return tuple(queues), tuple(read_workers(redis, now_s)), now_s


def live_workers(redis: Redis, queue: str | None = None) -> list[WorkerState]:
    """The workers that are alive and serve `queue` (None: any)."""
    workers = read_workers(redis, _redis_time_s(redis))
    return [w for w in workers if w.is_alive and (queue is None or queue in w.queues)]


def queue_of(redis: Redis, job_id: str) -> str | None:
    """The queue that a job was submitted to; None if there is no such job."""
    origin: Any = redis.hget(f"{RQ_KEY_PREFIX}:job:{job_id}", "origin")
    return None if origin is None else str(origin.decode())


def read_queue_names(redis: Redis) -> list[str]:
    """Shoal's queues in their order of priority, then the others that RQ knows."""
    prefix = f"{RQ_KEY_PREFIX}:queue:"
    members: Any = redis.smembers(f"{RQ_KEY_PREFIX}:queues")
    known = {member.decode().removeprefix(prefix) for member in members}
    return [*QUEUES, *sorted(known - set(QUEUES))]


def read_queues(redis: Redis, names: Sequence[str], now_s: float) -> list[QueueState]:
    """Depth, oldest age and registry sizes of each queue."""
    with redis.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.llen(f"{RQ_KEY_PREFIX}:queue:{name}")
            pipeline.lindex(f"{RQ_KEY_PREFIX}:queue:{name}", 0)
            for registry in REGISTRIES.values():
                pipeline.zcard(f"{RQ_KEY_PREFIX}:{registry}:{name}")
        replies = pipeline.execute()
    width = 2 + len(REGISTRIES)
    rows = [replies[start : start + width] for start in range(0, len(replies), width)]
    oldest = _enqueued_at(redis, [head for _depth, head, *_counts in rows if head is not None])
    queues = []
    for name, (depth, head, *counts) in zip(names, rows, strict=True):
        since_s = oldest.get(head)
        age_s = None if since_s is None else max(0.0, now_s - since_s)
        queues.append(QueueState(name, depth, age_s, dict(zip(REGISTRIES, counts, strict=True))))
    return queues


def read_workers(redis: Redis, now_s: float) -> list[WorkerState]:
    """The registered workers that have not said goodbye, by name."""
    members: Any = redis.smembers(f"{RQ_KEY_PREFIX}:workers")
    keys = sorted(key.decode() for key in members)
    with redis.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.hgetall(key)
        hashes = pipeline.execute()
    return [
        _worker(key.removeprefix(f"{RQ_KEY_PREFIX}:worker:"), fields, now_s)
        for key, fields in zip(keys, hashes, strict=True)
        if fields and b"death" not in fields
    ]


def read_runs(redis: Redis) -> list[RunState]:
    """The bulk runs of the last hour, as each was last told."""
    members: Any = redis.execute_command(*LIST_RUNS)
    run_ids = [member.decode() for member in members]
    with redis.pipeline(transaction=True) as pipeline:
        for run_id in run_ids:
            for command in read_commands(run_id):
                pipeline.execute_command(*command)
        replies = pipeline.execute()
    each = zip(run_ids, replies[::2], replies[1::2], strict=True)
    states = (read_state(run_id, values, ttl_ms) for run_id, values, ttl_ms in each)
    return [state for state in states if state is not None]


def read_failures(redis: Redis, queues: Iterable[str]) -> list[Failure]:
    """The newest failed jobs of each queue."""
    failures = []
    for queue in queues:
        newest: Any = redis.zrange(
            f"{RQ_KEY_PREFIX}:failed:{queue}", 0, MAX_FAILURES_SHOWN - 1, desc=True
        )
        for job_id in (member.decode() for member in newest):
            entries: Any = redis.xrevrange(results_key(job_id), count=1)
            failures.append(Failure(job_id, queue, _reason(job_id, entries)))
    return failures


def _reason(job_id: str, entries: list[Any]) -> str:
    try:
        read_job_result(JobState("failed", entry=entries[0][1] if entries else None), job_id)
    except ShoalError as error:
        return str(error).removeprefix(f"job {job_id} failed: ")
    return "no reason was recorded"


def _worker(name: str, fields: Mapping[bytes, bytes], now_s: float) -> WorkerState:
    text = {key.decode(): value.decode(errors="replace") for key, value in fields.items()}
    heartbeat_s = _timestamp_s(text.get("last_heartbeat"))
    return WorkerState(
        name=name,
        state=text.get("state", "starting"),
        queues=tuple(filter(None, text.get("queues", "").split(","))),
        hostname=text.get("hostname"),
        pid=_number(text.get("pid"), int),
        heartbeat_age_s=None if heartbeat_s is None else max(0.0, now_s - heartbeat_s),
        model=text.get("shoal_model"),
        device=text.get("shoal_device"),
        fingerprint=text.get("shoal_fingerprint"),
        slots=_number(text.get("shoal_slots"), int),
        running=_number(text.get("shoal_running"), int),
        tokens_per_s=_number(text.get("shoal_tokens_per_s"), float),
        busy_tokens_per_s=_number(text.get("shoal_busy_tokens_per_s"), float),
        padding_ratio=_number(text.get("shoal_padding_ratio"), float),
        tokens=_number(text.get("shoal_tokens"), int),
        padding_tokens=_number(text.get("shoal_padding_tokens"), int),
    )


def _number(text: str | None, kind: type[Number]) -> Number | None:
    try:
        return None if text is None else kind(text)
    except ValueError:
        return None


def _enqueued_at(redis: Redis, job_ids: Sequence[bytes]) -> dict[bytes, float]:
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.hget(f"{RQ_KEY_PREFIX}:job:{job_id.decode()}", "enqueued_at")
        replies = pipeline.execute()
    times = {
        job_id: _timestamp_s(reply.decode()) if reply else None
        for job_id, reply in zip(job_ids, replies, strict=True)
    }
    return {job_id: time_s for job_id, time_s in times.items() if time_s is not None}


def _timestamp_s(text: str | None) -> float | None:
    try:
        moment = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _redis_time_s(redis: Redis) -> float:
    # The server's clock: ages must not depend on whose machine asks.
    seconds, microseconds = redis.time()
    return float(seconds) + float(microseconds) / 1e6
