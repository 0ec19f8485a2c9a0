"""Cancelling in one step: what RQ would write, never over an end, and gone after a day."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from rq import Queue
from rq.executions import Execution
from rq.job import Job as RQJob
from rq.job import JobStatus, cancel_job
from rq.serializers import JSONSerializer

from shoal import AsyncClient, Client
from shoal.cancellation import CANCEL_TTL_S
from shoal.jobs import Handle, results_key, stream_key
from shoal.wire import GenerationRequest

Cancel = Callable[[str, Handle], bool]


def cancel_blocking(url: str, handle: Handle) -> bool:
    with Client(url) as client:
        return client.cancel(handle)


def cancel_async(url: str, handle: Handle) -> bool:
    async def run() -> bool:
        async with AsyncClient(url) as client:
            return await client.cancel(handle)

    return asyncio.run(run())


@pytest.fixture(params=[cancel_blocking, cancel_async])
def cancel(request: pytest.FixtureRequest) -> Cancel:
    """The same of both clients."""
    chosen: Cancel = request.param
    return chosen


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


def fetched(client: Client, job_id: str) -> RQJob:
    return RQJob.fetch(job_id, connection=client.redis, serializer=JSONSerializer)


def everything(connection: redis.Redis) -> dict[bytes, Any]:
    """All that Redis holds, without the times in it."""
    found: dict[bytes, Any] = {}
    keys: Any = connection.keys("*")
    for key in keys:
        match connection.type(key):
            case b"hash":
                found[key] = connection.hgetall(key)
            case b"zset":
                found[key] = connection.zrange(key, 0, -1)
            case b"list":
                found[key] = connection.lrange(key, 0, -1)
            case b"set":
                found[key] = connection.smembers(key)
    return found


def start(client: Client, job_id: str) -> None:
    job = fetched(client, job_id)
    with client.redis.pipeline() as pipeline:
        execution = Execution.create(job, ttl=60, pipeline=pipeline)
        job.prepare_for_execution("w", pipeline)
        pipeline.execute()
    client.redis.zadd("rq:wip:shoal-default", {execution.composite_key: 1e10})
    client.redis.delete("rq:queue:shoal-default")


def defer(client: Client, job_id: str) -> None:
    job = fetched(client, job_id)
    job.set_status(JobStatus.DEFERRED)
    queue = Queue("shoal-default", connection=client.redis, serializer=JSONSerializer)
    queue.deferred_job_registry.add(job, ttl=-1)
    client.redis.delete("rq:queue:shoal-default")


def leave_queued(client: Client, job_id: str) -> None:
    pass


@pytest.mark.parametrize("prepare", [leave_queued, start, defer])
def test_what_is_left_is_what_rq_s_own_cancel_leaves(
    client: Client, redis_url: str, cancel: Cancel, prepare: Callable[[Client, str], None]
) -> None:
    job_id = client.submit("p", idempotency_key="k").id
    prepare(client, job_id)
    before: Any = {key: client.redis.dump(key) for key in client.redis.keys("*")}
    cancel_job(job_id, connection=client.redis, serializer=JSONSerializer)
    by_rq = everything(client.redis)
    client.redis.flushdb()
    for key, dumped in before.items():
        client.redis.restore(key, 0, dumped)

    assert cancel(redis_url, Handle(job_id))

    assert everything(client.redis) == by_rq


@pytest.mark.parametrize("status", ["finished", "failed", "canceled", "stopped"])
def test_a_job_that_has_ended_stays_as_it_ended(
    client: Client, redis_url: str, cancel: Cancel, status: str
) -> None:
    jobs = client.submit_many([GenerationRequest(prompt=p) for p in "ab"])
    alone = client.submit("p")
    for job in (alone, jobs[0]):
        client.redis.hset(f"rq:job:{job.handle.job_id}", "status", status)
    before = everything(client.redis)

    assert not cancel(redis_url, alone.handle)
    assert not cancel(redis_url, jobs[1].handle)

    assert everything(client.redis) == before


def test_a_job_that_ends_while_it_is_being_cancelled_is_not_cancelled(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit("p")
    hget = client.redis.hget

    def hget_before_the_commit(key: str, field: str) -> Any:
        answer = hget(key, field)
        client.redis.hset(key, "status", "finished")
        return answer

    monkeypatch.setattr(client.redis, "hget", hget_before_the_commit)
    was_cancelled = job.cancel()
    monkeypatch.undo()

    assert not was_cancelled
    assert job.status == "finished"
    assert not client.redis.exists("rq:canceled:shoal-default")


def test_a_cancelled_job_and_its_keys_are_gone_after_a_day(
    client: Client, redis_url: str, cancel: Cancel
) -> None:
    job = client.submit("p", idempotency_key="k")
    client.redis.xadd(stream_key(job.id), {"at": 0, "text": "p"})
    client.redis.xadd(results_key(job.id), {"type": 1})

    assert cancel(redis_url, job.handle)

    for key in (f"rq:job:{job.id}", stream_key(job.id), results_key(job.id)):
        assert 0 < int(client.redis.ttl(key)) <= CANCEL_TTL_S


def test_the_list_of_cancelled_jobs_forgets_those_that_are_gone(client: Client) -> None:
    kept = client.submit("kept by whoever cancelled it")
    old_s = time.time() - CANCEL_TTL_S - 60
    client.redis.zadd("rq:canceled:shoal-default", {"gone": old_s, kept.id: old_s})

    job = client.submit("p")
    job.cancel()

    left = client.redis.zrange("rq:canceled:shoal-default", 0, -1)
    assert left == [kept.id.encode(), job.id.encode()]


def test_a_job_that_was_never_there_is_not_cancelled(redis_url: str, cancel: Cancel) -> None:
    assert not cancel(redis_url, Handle("unheard-of"))
    assert not cancel(redis_url, Handle("unheard-of", 1, 2))
