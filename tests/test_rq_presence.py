"""How the worker shows itself, where the process tests do not reach."""

from __future__ import annotations

import pytest
import redis
from rq import Worker
from rq.worker.base import WorkerStatus
from tests.fakes import FakeClock

from shoal.errors import ShoalError
from shoal_worker.rq_presence import Every, Presence


def test_something_is_due_at_first_then_once_a_period_and_when_it_is_reset() -> None:
    clock = FakeClock()
    every = Every(10.0, clock)
    assert [every.is_due(), every.is_due()] == [True, False]

    clock.now_s += 10
    assert [every.is_due(), every.is_due()] == [True, False]

    every.reset()
    assert [every.is_due(), every.is_due()] == [True, False]


def test_a_name_that_is_taken_is_refused(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        first, second = Presence(("q",), "w1", client), Presence(("q",), "w1", client)
        with (
            first.registered(),
            pytest.raises(ShoalError, match="choose another --name, or wait"),
            second.registered(),
        ):
            pass


def test_a_worker_that_redis_has_forgotten_is_registered_again(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        presence = Presence(("q",), "w1", client)
        with presence.registered():
            client.flushdb()
            presence.beat(WorkerStatus.BUSY, dict)

            [listed] = Worker.all(connection=client)
            assert (listed.name, listed.queue_names(), listed.get_state()) == ("w1", ["q"], "busy")


def test_a_server_that_is_too_old_is_refused(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        monkeypatch.setattr(client, "info", lambda _section: {"redis_version": "5.0.14"})
        presence = Presence(("q",), "w1", client)

        with (
            pytest.raises(ShoalError, match=r"Redis 5\.0\.14; Shoal needs 6\.2 or later"),
            presence.registered(),
        ):
            pass
