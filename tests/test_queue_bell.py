"""When to look for jobs, against a real server."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
import redis
from tests.conftest import wait_until

from shoal_worker.queue_bell import LOOK_S, QueueBell

KEYS = ["rq:queue:a", "rq:queue:b"]


@pytest.fixture
def connection(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@contextmanager
def bell(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[QueueBell]:
    """One that has found nothing and waits in Redis."""
    # Else a look would come due by time, and show nothing.
    monkeypatch.setattr("shoal_worker.queue_bell.LOOK_S", 1_000.0)
    with closing(QueueBell(redis.Redis.from_url(redis_url), KEYS, poll_s=0.0)) as one:
        assert one.should_look()
        one.looked(found=False)
        assert not one.should_look()
        yield one


def rings(one: QueueBell) -> bool:
    readable, _, _ = select.select([one.fd], [], [], 10)
    return bool(readable)


@pytest.mark.parametrize("key", KEYS)
def test_a_job_in_any_queue_rings_and_is_left_there(
    redis_url: str, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    with bell(redis_url, monkeypatch) as one:
        connection.rpush(key, "first", "second")

        assert rings(one)
        assert one.should_look()
        assert connection.lrange(key, 0, -1) == [b"first", b"second"]


def test_what_came_before_it_waits_rings_too(
    redis_url: str, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.rpush(KEYS[0], "there")

    with bell(redis_url, monkeypatch) as one:
        assert rings(one)


def test_after_a_find_there_may_be_more_and_after_none_it_waits_again(
    redis_url: str, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bell(redis_url, monkeypatch) as one:
        connection.rpush(KEYS[0], "it")
        assert rings(one)
        one.looked(found=True)
        assert one.has_backlog
        assert one.should_look()
        connection.delete(KEYS[0])

        one.looked(found=False)
        # Perhaps once more for what it had seen before.
        wait_until(lambda: settles(one), "it waits")
        connection.rpush(KEYS[1], "next")
        assert rings(one)


def settles(one: QueueBell) -> bool:
    if one.should_look():
        one.looked(found=False)
        return False
    return True


def test_without_the_right_to_wait_it_says_so_and_looks_are_due_by_time(
    redis_url: str, connection: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    connection.acl_setuser(
        "poor", enabled=True, nopass=True, commands=["+@all", "-blmove"], keys="*"
    )
    url = redis_url.replace("unix://", "unix://poor:x@")
    try:
        with closing(QueueBell(redis.Redis.from_url(url), KEYS, poll_s=0.05)) as one:
            one.looked(found=False)
            one.should_look()
            wait_until(lambda: "so we look for them" in caplog.text, "it says so")
            one.looked(found=False)
            assert one.wait_s() == pytest.approx(0.05)
            wait_until(one.should_look, "a look is due", timeout_s=LOOK_S * 20)
    finally:
        connection.acl_deluser("poor")


def test_closing_does_not_wait_for_its_time_out(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, connection: redis.Redis
) -> None:
    monkeypatch.setattr("shoal_worker.queue_bell.BLOCK_S", 100)
    blocked: Callable[[], bool] = lambda: info(connection) == len(KEYS)  # noqa: E731
    with bell(redis_url, monkeypatch):
        wait_until(blocked, "both wait")

    assert info(connection) == 0


def info(connection: redis.Redis) -> int:
    clients: dict[str, int] = connection.info("clients")
    return clients["blocked_clients"]
