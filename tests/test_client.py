"""The blocking client where Redis holds what another program wrote, and what it leaves there."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.connection import AbstractConnection
from tests.scripted_worker import ScriptedWorker

from shoal import Client, GenerationFailed, InvalidRequest
from shoal.jobs import EXPIRIES_KEY, cancel_key, results_key, stream_key


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def forgetful(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The server knows no script whenever something is sent to it, as if it had just restarted."""
    with redis.Redis.from_url(redis_url) as other:
        send: Any = AbstractConnection.send_packed_command

        def forget_and_send(
            connection: AbstractConnection, command: Any, check_health: bool = True
        ) -> None:
            if connection not in own_connections:
                other.script_flush()
            send(connection, command, check_health)

        other.ping()
        own_connections = [other.connection_pool.get_connection()]
        other.connection_pool.release(own_connections[0])
        monkeypatch.setattr(AbstractConnection, "send_packed_command", forget_and_send)
        yield


@pytest.mark.usefixtures("forgetful")
def test_jobs_are_sent_whatever_moment_the_server_is_restarted_at(client: Client) -> None:
    jobs = client.submit_many(["a", "b"], requests_per_job=1)

    assert [job.status for job in jobs] == ["queued", "queued"]


def test_a_result_that_nests_too_deeply_is_a_bad_one(client: Client) -> None:
    job = client.submit("p")
    client.redis.hset(f"rq:job:{job.id}", "status", "finished")
    entry: dict[Any, Any] = {"type": 1, "return_value": base64.b64encode(b"[" * 200_000)}
    client.redis.xadd(results_key(job.id), entry)

    with pytest.raises(GenerationFailed, match="not in the wire format") as caught:
        job.result(timeout=5)

    assert caught.value.code == "bad_result"


def test_a_job_of_many_requests_is_read_once_for_all(
    client: Client, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedWorker(redis_url):
        jobs = client.submit_many(["a", "b", "c"], requests_per_job=3)
        results = [jobs[0].result(timeout=5)]
    monkeypatch.setattr(client, "states", None)

    results += [job.result(timeout=5) for job in jobs[1:]]

    assert [result.prompt for result in results] == ["a", "b", "c"]
    assert len({result.id for result in results}) == 3


def test_a_forgotten_job_leaves_nothing(client: Client) -> None:
    job = client.submit("p")
    client.redis.delete("rq:queue:shoal-default", "rq:queues")
    client.redis.zadd(EXPIRIES_KEY, {job.id: 1e10})
    client.redis.zadd("rq:finished:shoal-default", {job.id: 1e10})
    client.redis.sadd(cancel_key(job.id), 0)
    for key in (results_key(job.id), stream_key(job.id)):
        client.redis.xadd(key, {"a": "b"})

    client.forget([job.id], "shoal-default")

    assert client.redis.keys("*") == []


def test_a_stream_that_is_left_early_is_cancelled(client: Client, redis_url: str) -> None:
    with ScriptedWorker(redis_url) as worker:
        worker.held_stream_text = " so far"
        pieces = client.stream("HOLD")
        assert next(pieces) == " so far"
        pieces.close()  # type: ignore[attr-defined]

    [key] = client.redis.keys("rq:job:*")
    assert client.redis.hget(key, "status") == b"canceled"


def test_a_stream_that_is_read_to_its_end_is_not_cancelled(client: Client, redis_url: str) -> None:
    with ScriptedWorker(redis_url):
        assert "".join(client.stream("p")) == " said 1 None 0"

    [key] = client.redis.keys("rq:job:*")
    assert client.redis.hget(key, "status") == b"finished"


def test_a_bad_request_for_a_stream_is_refused_at_once(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="max_tokens is 0"):
        client.stream("p", max_tokens=0)
