"""What must be true when all is over: each request has its own result once, nothing is left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import redis
from rq import Queue
from rq.serializers import JSONSerializer

from shoal import Client, ShoalError
from shoal.client import Job

LEASES_KEY = "rq:shoal:leases"
# Sets and lists that name jobs in flight; each must be gone or empty.
IN_FLIGHT_PATTERNS = ("rq:executions:*", "rq:execution:*", "rq:wip:*", "rq:worker:*:executions")
STRAY_PATTERNS = ("rq:queue:*:intermediate", "rq:queue:*:deferred", "rq:ready:*", "rq:scheduled:*")


def lost_requests(jobs: Iterable[Job], timeout_s: float) -> list[str]:
    """Requests without a result of their own `timeout_s` seconds from now, each with its reason."""
    end_s = time.monotonic() + timeout_s
    lost = []
    for job in jobs:
        assert job.request is not None
        try:
            text = job.result(max(0.01, end_s - time.monotonic())).text
        except ShoalError as error:
            lost.append(f"request {job.id}: {type(error).__name__}: {error}")
            continue
        if text != str(job.request.prompt).upper():
            lost.append(f"request {job.id} has the result of another")
    return lost


def result_entries(client: redis.Redis, job_ids: Sequence[str]) -> dict[str, int]:
    """Entries in each job's result stream; more than one is a job that was committed twice."""
    with client.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.xlen(f"rq:results:{job_id}")
        return dict(zip(job_ids, pipeline.execute(), strict=True))


def leftovers(client: redis.Redis) -> list[str]:
    """What Redis still says is queued, running, failed or in between."""
    left = [f"{key} holds {size}" for key, size in _sizes(client, IN_FLIGHT_PATTERNS)]
    left += [f"{key} holds {size}" for key, size in _sizes(client, STRAY_PATTERNS)]
    if num_leases := client.zcard(LEASES_KEY):
        left.append(f"{num_leases} leases")
    for queue in Queue.all(connection=client, serializer=JSONSerializer):
        failed = client.zrange(queue.failed_job_registry.key, 0, -1)
        left += [f"{queue.count} jobs queued in {queue.name}"] if queue.count else []
        left += [f"{len(failed)} failed in {queue.name}: {failed[0]!r}"] if failed else []
    return left


def settle(client: redis.Redis, timeout_s: float) -> list[str]:
    """The leftovers once there are none, or after `timeout_s` seconds."""
    end_s = time.monotonic() + timeout_s
    while (left := leftovers(client)) and time.monotonic() < end_s:
        time.sleep(0.05)
    return left


def job_ids_of(jobs: Iterable[Job]) -> list[str]:
    """The RQ jobs that requests travelled in, each once."""
    return list(dict.fromkeys(job.handle.job_id for job in jobs))


def committed_executions(client: redis.Redis, job_id: str) -> list[str]:
    """The execution that wrote each entry of a job's result stream."""
    entries: Any = client.xrange(f"rq:results:{job_id}")
    return [fields.get(b"execution_id", b"").decode() for _, fields in entries]


def assert_each_request_came_back_once(
    client: Client, jobs: Sequence[Job], timeout_s: float = 60.0
) -> None:
    """All results are there, once, and nothing is left over."""
    assert lost_requests(jobs, timeout_s) == []
    entries = result_entries(client.redis, job_ids_of(jobs))
    assert {job_id: count for job_id, count in entries.items() if count != 1} == {}
    assert settle(client.redis, timeout_s=5.0) == []


def _sizes(client: redis.Redis, patterns: Sequence[str]) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for pattern in patterns:
        for key in client.scan_iter(pattern, count=1000):
            kind: Any = client.type(key)
            counts = {b"zset": client.zcard, b"set": client.scard, b"list": client.llen}
            size = int(counts[kind](key)) if kind in counts else int(client.exists(key))
            if size:
                found.append((key.decode(), size))
    return found
