"""A worker that dies at one exact place: all its requests come back, once, from another."""

from __future__ import annotations

import time

import pytest
from tests.conftest import wait_until
from tests.faults.audit import assert_each_request_came_back_once
from tests.faults.conftest import StartWorker
from tests.faults.points import VARIABLE

from shoal import Client

LEASE_S = 1.0
RECOVERY_LIMIT_S = LEASE_S + 10.0
SUBMITTED = [f"prompt {i}" for i in range(40)]

DYING_WORKER = [
    "claim:before:1",
    "claim:after:1",
    "claim:after:2",
    "submit:after:1",
    "submit:after:7",
    "renew:before:1",
    "renew:after:2",
    "answer:after:1",
    "commit:before:1",
    "commit:after:1",
    "commit:after:2",
]


@pytest.mark.parametrize("point", DYING_WORKER)
def test_a_worker_s_death_at_a_point_loses_nothing(
    client: Client, start_worker: StartWorker, point: str
) -> None:
    jobs = client.submit_many(SUBMITTED, requests_per_job=4)
    dying = start_worker(environment={VARIABLE: point}, ready=False, delay_s=0.8, max_in_flight=24)
    assert dying.wait_exit() == -9, dying.log
    died_s = time.monotonic()

    start_worker(lease_s=LEASE_S)

    assert_each_request_came_back_once(client, jobs, timeout_s=RECOVERY_LIMIT_S)
    assert time.monotonic() - died_s < RECOVERY_LIMIT_S


@pytest.mark.parametrize(
    "point", ["engine-submit:after:1", "engine-submit:after:7", "engine-answer:after:1"]
)
def test_an_engine_s_death_at_a_point_loses_nothing(
    client: Client, start_worker: StartWorker, point: str
) -> None:
    jobs = client.submit_many(SUBMITTED, requests_per_job=4)
    worker = start_worker(environment={VARIABLE: point}, ready=False, delay_s=0.2)

    assert_each_request_came_back_once(client, jobs, timeout_s=RECOVERY_LIMIT_S)

    assert worker.exit_code is None
    assert "was killed by SIGKILL" in worker.log


@pytest.mark.parametrize("point", ["recover:before:1", "recover:after:1"])
def test_a_death_in_mid_recovery_of_another_s_jobs_loses_nothing(
    client: Client, start_worker: StartWorker, point: str
) -> None:
    first = start_worker(delay_s=60)
    jobs = client.submit_many(SUBMITTED, requests_per_job=4)
    wait_until(lambda: jobs[-1].status == "started", "the jobs run")
    first.kill()
    second = start_worker(environment={VARIABLE: point}, ready=False, delay_s=60)
    assert second.wait_exit() == -9, second.log
    died_s = time.monotonic()

    start_worker(lease_s=LEASE_S)

    assert_each_request_came_back_once(client, jobs, timeout_s=RECOVERY_LIMIT_S)
    assert time.monotonic() - died_s < RECOVERY_LIMIT_S


@pytest.mark.parametrize("point", ["commit:before:1", "commit:after:1"])
def test_a_death_while_giving_jobs_back_loses_nothing(
    client: Client, start_worker: StartWorker, point: str
) -> None:
    dying = start_worker(environment={VARIABLE: point}, delay_s=60, drain_timeout_s=0)
    jobs = client.submit_many(SUBMITTED, requests_per_job=4)
    wait_until(lambda: jobs[-1].status == "started", "the jobs run")
    dying.terminate()
    assert dying.wait_exit() == -9, dying.log

    start_worker(lease_s=LEASE_S)

    assert_each_request_came_back_once(client, jobs, timeout_s=RECOVERY_LIMIT_S)
