"""A worker that stands still past its lease and comes back: what it says then is refused."""

from __future__ import annotations

from tests.conftest import wait_until
from tests.faults.audit import assert_each_request_came_back_once, committed_executions, job_ids_of
from tests.faults.conftest import StartWorker
from tests.faults.processes import moved

from shoal import Client


def test_a_stopped_worker_s_results_are_refused_and_counted_and_it_goes_on(
    client: Client, start_worker: StartWorker
) -> None:
    zombie = start_worker(delay_s=1.0)
    jobs = client.submit_many([f"p{i}" for i in range(10)], requests_per_job=2)
    wait_until(lambda: jobs[-1].status == "started", "the jobs run")
    zombie.freeze()
    held = zombie.held(client.redis)
    assert sorted(held) == sorted(job_ids_of(jobs))
    # Its engine goes on, so that all results lie ready for it when it wakes.
    other = start_worker()
    wait_until(lambda: all(job.done() for job in jobs), "another has run them all")

    zombie.go_on()

    wait_until(lambda: moved(zombie, "fenced") == len(held), "each late result is refused")
    assert moved(zombie, "committed") == 0
    assert_each_request_came_back_once(client, jobs)
    for job_id, execution_id in held.items():
        assert execution_id not in committed_executions(client.redis, job_id)
    other.kill()
    assert client.submit("after").result(timeout=60).text == "AFTER"


def test_a_stopped_worker_that_wakes_while_another_runs_its_jobs_takes_nothing_back(
    client: Client, start_worker: StartWorker
) -> None:
    zombie = start_worker(delay_s=1.0)
    jobs = client.submit_many([f"p{i}" for i in range(10)], requests_per_job=2)
    wait_until(lambda: jobs[-1].status == "started", "the jobs run")
    zombie.freeze()
    other = start_worker(delay_s=2.0)
    wait_until(lambda: len(other.held(client.redis)) == 5, "another runs them all")
    held = other.held(client.redis)

    zombie.go_on()

    wait_until(lambda: moved(zombie, "fenced") == len(held), "each lost job is counted")
    assert_each_request_came_back_once(client, jobs)
    for job_id, execution_id in held.items():
        assert committed_executions(client.redis, job_id) == [execution_id]
    assert moved(zombie, "committed") == 0
    zombie.assert_alive()


def test_a_worker_stopped_for_less_than_its_lease_loses_nothing(
    client: Client, start_worker: StartWorker
) -> None:
    worker = start_worker(delay_s=1.0, lease_s=30)
    start_worker(lease_s=30)
    jobs = client.submit_many(["a", "b"], requests_per_job=1)
    wait_until(lambda: jobs[-1].status == "started", "the jobs run")
    runs = worker.held(client.redis)
    worker.freeze()

    worker.go_on()

    assert_each_request_came_back_once(client, jobs)
    for job_id, execution_id in runs.items():
        assert committed_executions(client.redis, job_id) == [execution_id]
