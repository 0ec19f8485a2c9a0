"""Throughput: tokens a second over the last ten seconds, padding since the start."""

from __future__ import annotations

import pytest

from shoal_worker.events import JobsMoved, StepRun
from shoal_worker.throughput import Throughput


class Clock:
    """A clock that stands until it is set."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def throughput(clock: Clock) -> Throughput:
    return Throughput(clock)


def test_nothing_done_is_no_speed_and_no_padding(throughput: Throughput, clock: Clock) -> None:
    clock.now_s += 60

    assert throughput.tokens_per_s() == 0.0
    assert throughput.padding_ratio() == 0.0


def test_a_steady_speed_is_told_as_it_is(throughput: Throughput, clock: Clock) -> None:
    for _ in range(300):  # 30 s of 8 tokens each 0.1 s
        clock.now_s += 0.1
        throughput(decode(8))

    assert throughput.tokens_per_s() == pytest.approx(80, rel=0.02)


def test_the_mean_is_over_the_time_since_the_start_while_that_is_short(
    throughput: Throughput, clock: Clock
) -> None:
    clock.now_s += 4
    throughput(decode(100))

    assert throughput.tokens_per_s() == 25.0


def test_the_first_step_alone_is_no_speed_of_thousands(
    throughput: Throughput, clock: Clock
) -> None:
    clock.now_s += 0.001
    throughput(decode(32))

    assert throughput.tokens_per_s() == 32.0


def test_a_worker_that_fell_idle_is_at_0_ten_seconds_later(
    throughput: Throughput, clock: Clock
) -> None:
    throughput(decode(1000))

    clock.now_s += 5
    assert throughput.tokens_per_s() > 0
    clock.now_s += 5
    assert throughput.tokens_per_s() == 0.0


def test_a_prefill_makes_one_token_a_row(throughput: Throughput, clock: Clock) -> None:
    clock.now_s += 2
    throughput(prefill(rows=4, tokens=100, padding=28))

    assert throughput.tokens_per_s() == 2.0


def test_padding_is_the_share_of_both_phases_since_the_start(
    throughput: Throughput, clock: Clock
) -> None:
    throughput(prefill(rows=4, tokens=100, padding=28))
    clock.now_s += 3600
    throughput(decode(8, padding=24))

    assert throughput.padding_ratio() == pytest.approx(52 / 160)


def test_other_events_change_nothing(throughput: Throughput) -> None:
    throughput(JobsMoved("claimed", "shoal-bulk", 3))

    assert throughput.tokens_per_s() == 0.0


def test_an_hour_of_steps_keeps_ten_seconds_of_them(throughput: Throughput, clock: Clock) -> None:
    for _ in range(3600):
        clock.now_s += 1
        throughput(decode(8))

    assert len(throughput._seconds) == 10


def decode(tokens: int, padding: int = 0) -> StepRun:
    return StepRun("decode", "bulk-32x256", tokens, tokens + padding, tokens, padding, 0.1)


def prefill(rows: int, tokens: int, padding: int) -> StepRun:
    return StepRun("prefill", "bulk-32x256", rows, rows, tokens, padding, 0.1)


def test_totals_tell_both_kinds_of_positions(throughput: Throughput) -> None:
    throughput(decode(8))
    throughput(decode(2))

    tokens, padding_tokens = throughput.totals()

    assert tokens == 10
    assert throughput.padding_ratio() == padding_tokens / (tokens + padding_tokens)


def test_the_rate_while_busy_knows_no_pauses() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    assert throughput.busy_tokens_per_s() == 0.0

    throughput(StepRun("decode", "l", rows=4, slots=8, tokens=4, padding_tokens=4, duration_s=0.5))
    clock.now_s += 100
    throughput(
        StepRun("prefill", "l", rows=2, slots=4, tokens=60, padding_tokens=0, duration_s=1.0)
    )

    assert throughput.busy_tokens_per_s() == 4.0
