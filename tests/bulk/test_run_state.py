"""A run's state in Redis: what was told is read again, with its age, until it goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from shoal.bulk.run_state import STATE_TTL_S, RunState, save_commands, state_key
from shoal.client import Client
from shoal.status import read_runs

STATE = RunState(
    run_id="3f2a",
    status="running",
    output="out.jsonl",
    queue="shoal-bulk",
    rows_total=10,
    rows_done=3,
    rows_failed=1,
    workers=2,
    tokens_per_s=12.5,
    mean_tokens_per_s=11.0,
    model="m",
    eta_s=90.0,
)


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


def test_a_state_is_read_as_it_was_told_the_last_time(client: Client) -> None:
    client.execute(save_commands(replace(STATE, padding_ratio=0.5), 1_000.0))
    client.execute(save_commands(STATE, 1_001.0))

    [found] = read_runs(client.redis)

    assert replace(found, age_s=0.0) == STATE
    assert 0 <= found.age_s < 60
    assert not found.is_stale


def test_a_run_that_is_silent_for_long_is_stale_unless_it_has_ended(client: Client) -> None:
    for run_id, status in (("a", "running"), ("b", "complete")):
        state = replace(STATE, run_id=run_id, status=status)
        client.execute(save_commands(state, 1_000.0))
        client.redis.expire(state_key(run_id), STATE_TTL_S - 100)

    assert [run.is_stale for run in read_runs(client.redis)] == [True, False]


def test_a_state_that_went_is_not_read_and_its_name_goes_with_the_next_one(client: Client) -> None:
    client.execute(save_commands(replace(STATE, run_id="old"), 1_000.0))
    client.redis.delete(state_key("old"))
    assert read_runs(client.redis) == []

    client.execute(save_commands(STATE, 1_000.0 + STATE_TTL_S + 1))

    assert client.redis.zrange("rq:shoal:bulk:runs", 0, -1) == [b"3f2a"]


def test_what_another_version_wrote_is_left_out(client: Client) -> None:
    client.execute(save_commands(STATE, 1_000.0))
    client.redis.hset(state_key("3f2a"), "rows_done", "many")

    assert read_runs(client.redis) == []
