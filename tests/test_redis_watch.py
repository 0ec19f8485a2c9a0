"""How the worker lives through a Redis that fails."""

from __future__ import annotations

import pytest
import redis

from shoal_worker.events import Event, RedisRoundTrip
from shoal_worker.redis_watch import MAX_RETRY_S, RETRY_S, RedisWatch


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("gone"),
        redis.TimeoutError("silent"),
        redis.OutOfMemoryError("full"),
        redis.ReadOnlyError("a replica"),
        redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"),
        redis.ResponseError("BUSY Redis is busy running a script"),
        redis.ResponseError("NOREPLICAS Not enough good replicas to write"),
        redis.ResponseError("ERR Error running script: @user_script:9: -READONLY You can't"),
    ],
)
def test_a_fault_skips_the_turn_waits_and_is_over_with_the_next_answer(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    watch = RedisWatch(lambda _event: None, sleep=slept.append)

    for _ in range(2):
        with watch.answering():
            raise error
    assert watch.is_away
    with watch.answering():
        pass

    assert not watch.is_away
    assert slept == [RETRY_S, 2 * RETRY_S]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_the_wait_between_attempts_is_bounded_and_short_again_afterwards() -> None:
    slept: list[float] = []
    watch = RedisWatch(lambda _event: None, sleep=slept.append)

    for fails in [*[True] * 9, False, True]:
        with watch.answering():
            if fails:
                raise redis.ConnectionError

    assert max(slept) == MAX_RETRY_S
    assert slept[-1] == RETRY_S


def test_a_refused_password_is_not_waited_out() -> None:
    watch = RedisWatch(lambda _event: None)

    with pytest.raises(redis.AuthenticationError), watch.answering():
        raise redis.AuthenticationError("WRONGPASS")


def test_any_other_error_is_not_swallowed() -> None:
    watch = RedisWatch(lambda _event: None)

    with pytest.raises(redis.ResponseError), watch.answering():
        raise redis.ResponseError("a defect")


def test_a_round_trip_is_told_with_its_outcome() -> None:
    events: list[Event] = []
    watch = RedisWatch(events.append)

    with watch.timed("claim"):
        pass
    with pytest.raises(redis.TimeoutError), watch.timed("commit"):
        raise redis.TimeoutError

    told = [(e.command, e.failed) for e in events if isinstance(e, RedisRoundTrip)]
    assert told == [("claim", False), ("commit", True)]
